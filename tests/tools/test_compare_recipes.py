"""Recipes trained side by side, once; what was trained by other arguments is refused."""

from __future__ import annotations

import json
import re

import pytest

from fp8lm.config import load_config
from tests.launch.conftest import ROOT

CONFIG = ROOT / "configs/gpt_tiny.yaml"
TINY = (
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "data.mock_data=true",
    "train.train_iters=2",
    "train.eval_iters=1",
    "scheduler.lr_warmup_iters=0",
    "logging.log_interval=1",
    "logging.fp8_stats_interval=2",
)


@pytest.mark.slow
def test_recipes_are_trained_once(run_tool, tmp_path, capsys):
    output = tmp_path / "recipes"
    recipes = ("--recipes", "bf16", "wide=preset=o3,main_grads_dtype=fp32")
    command = ("compare_recipes", "--config", CONFIG, "--output", output, *recipes, "--jobs", 2)
    assert run_tool(*command, *TINY) == 0
    summary = json.loads((output / "summary.json").read_text())
    losses = {name: row["validation losses"] for name, row in summary.items()}
    assert len(losses["bf16"]) == 1 and losses["bf16"] != losses["wide"]
    assert [summary[name]["state bytes per linear parameter"] // 1 for name in losses] == [18, 10]
    assert summary["bf16"]["SNR dB"].keys() == {"weight"}  # cast from the step's fp32
    assert all(20 < snr < 45 for snr in summary["wide"]["SNR dB"].values())
    assert summary["wide"]["SNR dB"].keys() == {"input", "weight", "grad_output"}
    assert [p["iteration"] for p in summary["wide"]["gap % over time"]] == [0, 2]
    printed = capsys.readouterr().out
    assert re.search(r"s/iteration +B/wires +dB of input +dB of weight +dB of grad_output", printed)
    assert re.search(r"above bf16 +2\nwide +[+-]\d", printed)
    for name in losses:
        config = json.loads((output / f"{name}-1/recipe.json").read_text())
        assert config["done"] and "data.shuffle_seed=1" in config["arguments"]
    assert all((output / name).stat().st_size > 1000 for name in ("loss.png", "gaps.png"))

    before = (output / "wide-1/log.txt").read_text()
    assert run_tool(*command, *TINY) == 0
    assert (output / "wide-1/log.txt").read_text() == before
    capsys.readouterr()
    assert summary["wide"]["seeds"] == [1]
    assert summary["wide"]["precision"]["main_grads_dtype"] == "fp32"
    sent = [summary[name]["bytes on wires per linear parameter"] for name in losses]
    assert sent == [6, 2]  # an fp32 gradient travels in FP8, as the wire of o3 says

    assert run_tool(*command, *TINY, "optimizer.lr=1e-4") == 2
    assert "bf16-1 holds a run with optimizer.lr = " in capsys.readouterr().err
    record = output / "wide-1/recipe.json"
    record.write_text(record.read_text()[:50])
    assert run_tool(*command, *TINY) == 2
    assert f"{record} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "sent", "outer_in_bf16"),  # of three layers, gradient and weight
    [
        ("bf16", 4 + 2, 4 + 2),
        ("o1", 1 + 2, 1 + 2),
        ("o4", 1 + 1, (3 * 1 + 2 * 2 + 1) / 3),
        ("o3_long", 1 + 4 / 32 + 1, (3 * 1 + 2 * 2 + 1 + 4 / 32) / 3),  # blocks of 32
        ("coat", 2 + 2, 2 + 2),
    ],
)
def test_bytes_on_wires_are_those_of_all_layers(preset, sent, outer_in_bf16, tool):
    for outer, expected in (("false", sent), ("true", outer_in_bf16)):
        keys = (f"precision.preset={preset}", f"precision.first_last_layers_bf16={outer}")
        sizes = ("model.num_layers=3", "model.ffn_hidden_size=32")
        config = load_config(CONFIG, [*TINY, *keys, *sizes])
        assert tool("compare_recipes").sent_bytes(config) == pytest.approx(expected)


def test_a_config_that_has_changed_is_another_run(run_tool, tmp_path, capsys):
    output, config = tmp_path / "recipes", tmp_path / "c.yaml"
    command = ("compare_recipes", "--config", config, "--output", output, "--recipes", "bf16", "o3")
    config.write_text(f"base: {CONFIG}\noptimizer: {{lr: 1.0e-3}}\n")
    assert run_tool(*command, *TINY, "train.exit_interval=1") == 1  # before the last iteration
    assert "bf16-1 stopped after iteration 1 of 2" in capsys.readouterr().err
    assert not json.loads((output / "bf16-1/recipe.json").read_text())["done"]
    config.write_text(f"base: {CONFIG}\noptimizer: {{lr: 9.0e-2}}\n")
    assert run_tool(*command, *TINY, "train.exit_interval=1") == 2
    assert "holds a run with optimizer.lr = 0.001, not 0.09" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override", ["train.seed=3", "precision.wire.grads=bf16", "logging.dir=elsewhere"]
)
def test_what_would_make_runs_no_pairs(override, run_tool, tmp_path, capsys):
    options = ("--config", CONFIG, "--output", tmp_path / "recipes", "--recipes", "bf16", "o3")
    assert run_tool("compare_recipes", *options, *TINY, override) == 2
    assert override.partition("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "recipes").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        *("bf16", "o9", "=preset=o3", "a/b=preset=o3", "x=main_grads_dtype=fp12"),
        "x=preset=o3,preset=o4",
    ],
)
def test_a_recipe_that_is_none(recipe, run_tool, tmp_path, capsys):
    output = tmp_path / "recipes"
    options = ("--config", CONFIG, "--output", output, "--recipes", "bf16", recipe)
    assert run_tool("compare_recipes", *options, *TINY) == 2
    error = capsys.readouterr().err
    assert recipe.split("=")[-1] in error and "model." not in error
    assert not output.exists()
