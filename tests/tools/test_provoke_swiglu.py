"""What a planted channel does to the casts of three recipes on a tiny model."""

from __future__ import annotations

import json

import pytest

from tests.launch.conftest import ROOT

CONFIG = ROOT / "configs/gpt_tiny.yaml"
TINY = (
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.seq_length=32",
    "data.mock_data=true",
    "train.micro_batch_size=1",
    "train.global_batch_size=1",
    "train.train_iters=20",
    "train.eval_iters=1",
    "scheduler.lr_warmup_iters=0",
)
GATED = ("model.swiglu=true", "model.untie_embeddings_and_output_weights=true")
SMOOTH = "smooth=preset=te_delayed,smooth_swiglu=true"


@pytest.mark.slow
def test_what_a_channel_does(run_tool, tmp_path, capsys):
    output, picture = tmp_path / "rows.json", tmp_path / "picture.png"
    command = ("provoke_swiglu", "--config", CONFIG, "--json", output, "--plot", picture)
    recipes = ("--recipes", "te", "te_delayed", SMOOTH)
    assert run_tool(*command, *recipes, *TINY, *GATED) == 0
    assert picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in ("te", "te_delayed", "smooth"))
    te, delayed, smooth = json.loads(output.read_text())
    first = te["steps_with_token"][0]
    # About (400 (sqrt(32) - 4.5))^2.
    assert max(delayed["amaxes"][:first]) < 10 < 1e5 < delayed["amaxes"][first] < 1e6
    assert te["underflow"][first] > 0.3 > te["underflow"][first - 1]
    assert te["underflow"][first + 1] < 0.1 and max(te["saturated"]) == 0
    assert delayed["saturated"][first] > 0 == delayed["saturated"][first - 1]
    assert delayed["underflow"][first] < 0.1 and min(delayed["underflow"][first + 1 :]) > 0.3
    assert max(smooth["underflow"]) < 0.1 and max(smooth["saturated"][1:]) == 0


@pytest.mark.slow
def test_nothing_is_planted_without_strength(run_tool, tmp_path):
    output = tmp_path / "rows.json"
    options = ("--strength", 0, "--recipes", "bf16", "--json", output)
    assert run_tool("provoke_swiglu", "--config", CONFIG, *options, *TINY, *GATED) == 0
    (row,) = json.loads(output.read_text())
    assert max(row["amaxes"]) < 10 and len(row["losses"]) == 20


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (GATED[1:], "model.swiglu=true"),
        (GATED[:1], "model.untie_embeddings_and_output_weights=true"),
        ((*GATED, "model.disable_bias_linear=true"), "model.disable_bias_linear"),
        ((*GATED, "train.train_iters=null", "train.train_samples=9"), "train.train_iters"),
        ((*GATED, "train.seed=2"), "train.seed"),
        ((*GATED, "--strength", -1), "--strength"),
    ],
)
def test_bad_input(run_tool, capsys, keys, named):
    assert run_tool("provoke_swiglu", "--config", CONFIG, *TINY, *keys) == 2
    assert named in capsys.readouterr().err
