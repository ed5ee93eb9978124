"""tools/bench_optimizer.py measures replicas of whole models."""

from __future__ import annotations

from tests.launch.conftest import ROOT


def test_stages_are_refused(run_tool, capsys):
    config = ROOT / "configs/gpt_tiny.yaml"
    stages = "parallel.pipeline_model_parallel_size=2"
    assert run_tool("bench_optimizer", "--config", config, stages) == 2
    assert "parallel.pipeline_model_parallel_size = 2: a stage holds" in capsys.readouterr().err
