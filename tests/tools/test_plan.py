"""tools/plan.py: table, numbers and picture; the search; bad input."""

from __future__ import annotations

import json

import pytest

from tests.launch.conftest import ROOT

TINY = ROOT / "configs/gpt_tiny.yaml"
SMALL = ("model.num_layers=4", "train.global_batch_size=32")


@pytest.mark.slow
def test_the_command(run_tool, tmp_path, capsys):
    numbers, picture = tmp_path / "plan.json", tmp_path / "pictures/plan.png"
    files = ("--json", numbers, "--output", picture)
    layout = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    argv = ("--config", TINY, "--world-size", 4, "--gpu", "h200", *files, *layout, *SMALL)
    assert run_tool("plan", *argv) == 0
    shown = json.loads(numbers.read_text())
    assert shown["gpu"]["name"] == "NVIDIA H200"
    assert list(shown["presets"]) == ["o3", "bf16"]
    own = shown["presets"]["o3"]
    assert own.items() <= shown.items()
    memory = own["memory_gb"]
    assert memory["least"] <= memory["most"] == pytest.approx(sum(memory["by_component"].values()))
    assert memory["fits"] and own["largest_micro_batch"] >= 4
    assert own["wire_bytes"]["tp_gather"] and own["wire_bytes"]["params"]
    assert own["step_ms"] == pytest.approx(sum(own["step_ms_by_part"].values()))
    assert own["step_ms"] < shown["presets"]["bf16"]["step_ms"] * 2
    assert 0 < own["mfu"] < 1
    assert picture.stat().st_size > 10_000
    assert "TP 2 with SP, PP 1, DP 2" in capsys.readouterr().out


@pytest.mark.slow
def test_the_search(run_tool, tmp_path, capsys):
    numbers = tmp_path / "sweep.json"
    argv = ("--config", TINY, "--world-size", 8, "--sweep", "--json", numbers, *SMALL)
    assert run_tool("plan", *argv) == 0
    best = json.loads(numbers.read_text())["best"]
    times = [each["step_ms"] for each in best]
    assert len(best) == 5 and times == sorted(times)
    assert best[0]["memory_gb"]["fits"]
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("TP 8") and "num_attention_heads" in line for line in lines)
    assert sum("slower" in line for line in lines) >= 4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--gpu", "a100"), ("a100", "b200", "h100", "h200")),
        (("--gpu", "missing.yaml"), ("missing.yaml",)),
        (("--world-size", 3, "parallel.tensor_model_parallel_size=2"), ("3 processes", "2")),
        (("--world-size", 3), ("global_batch_size", "3 data-parallel ranks")),
        (("--world-size", 0), ("--world-size",)),
        (("--preset", "o9"), ("precision.preset", "o9")),
        (("model.hidden_sizes=3",), ("model.hidden_sizes",)),
        (("--sweep", "--preset", "te"), ("--sweep", "--preset")),
    ],
)
def test_bad_input(run_tool, capsys, argv, words):
    assert run_tool("plan", "--config", TINY, *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


def test_what_fits_nowhere(run_tool, capsys):
    config = ROOT / "configs/gpt_175b.yaml"
    assert run_tool("plan", "--config", config, "--world-size", 4, "--sweep") == 2
    assert "nothing fits" in capsys.readouterr().err
