"""Recipes trained side by side, once; what was trained by other arguments is refused."""

from __future__ import annotations

import json
import re

import pytest

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
    assert "SNR, dB" in printed
    assert re.search(r"above bf16 +2\nwide +[+-]\d", printed)
    for name in losses:
        config = json.loads((output / f"{name}-1/recipe.json").read_text())
        assert config["done"] and "data.shuffle_seed=1" in config["arguments"]
    assert all((output / name).stat().st_size > 1000 for name in ("loss.png", "gaps.png"))

    before = (output / "wide-1/log.txt").read_text()
    assert run_tool(*command, *TINY) == 0
    assert (output / "wide-1/log.txt").read_text() == before
    capsys.readouterr()
    assert run_tool(*command, *TINY, "optimizer.lr=1e-4") == 2
    assert "holds a run of other arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override", ["train.seed=3", "precision.wire.grads=bf16", "logging.dir=elsewhere"]
)
def test_what_would_make_runs_no_pairs(override, run_tool, tmp_path, capsys):
    options = ("--config", CONFIG, "--output", tmp_path / "recipes", "--recipes", "bf16", "o3")
    assert run_tool("compare_recipes", *options, *TINY, override) == 2
    assert override.partition("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "recipes").exists()


@pytest.mark.parametrize(
    "recipe", ["bf16", "o9", "=preset=o3", "a/b=preset=o3", "x=main_grads_dtype=fp12"]
)
def test_a_recipe_that_is_none(recipe, run_tool, tmp_path, capsys):
    output = tmp_path / "recipes"
    options = ("--config", CONFIG, "--output", output, "--recipes", "bf16", recipe)
    assert run_tool("compare_recipes", *options, *TINY) == 2
    error = capsys.readouterr().err
    assert recipe.split("=")[-1] in error and "model." not in error
    assert not output.exists()
