"""What the tool computes on one process is what several processes do, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

from fp8lm.numerics import E4M3
from tests.gradient.test_hierarchical import REPLICATED, means_at_owners, stored
from tests.launch.conftest import ROOT

pytestmark = pytest.mark.slow


def test_a_run_is_measured_twice(run_tool, tmp_path):
    config, output = ROOT / "configs/gpt_tiny.yaml", tmp_path / "measured.json"
    size = ("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2")
    keys = ("data.mock_data=true", "train.global_batch_size=2", "train.micro_batch_size=1", *size)
    moments = ("--early", 1, "--late", 2, "--output", output)
    assert run_tool("measure_reduction", "--config", config, *moments, *keys) == 0
    assert set(json.loads(output.read_text())) == {"early", "late"}


def test_two_hops(tool, run_distributed, monkeypatch):
    measure = tool("measure_reduction")
    monkeypatch.setattr(measure, "NODE", 2)
    (found, *_), *_ = run_distributed(means_at_owners, 4, E4M3, REPLICATED)  # rank 0 owns the first
    assert torch.equal(found, measure.hierarchical([stored(rank) for rank in range(4)]))
