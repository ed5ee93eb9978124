"""tools/bench_optimizer.py measures replicas of whole models."""

from __future__ import annotations

from tests.launch.conftest import ROOT


def test_every_phase_of_a_step_is_timed(run_tool, tmp_path):
    config, output = ROOT / "configs/gpt_tiny.yaml", tmp_path / "times.json"
    size = ("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2")
    run = ("--steps", 1, "--output", output, "data.mock_data=true", *size)
    assert run_tool("bench_optimizer", "--config", config, *run) == 0
    assert output.read_text().count('"gather"') == 2


def test_stages_are_refused(run_tool, capsys):
    config = ROOT / "configs/gpt_tiny.yaml"
    stages = "parallel.pipeline_model_parallel_size=2"
    assert run_tool("bench_optimizer", "--config", config, stages) == 2
    assert "parallel.pipeline_model_parallel_size = 2: a stage holds" in capsys.readouterr().err
