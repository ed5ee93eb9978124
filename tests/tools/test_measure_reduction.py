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
    size = ("model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2")
    keys = ("data.mock_data=true", "train.global_batch_size=2", "train.micro_batch_size=1", *size)
    moments = ("--early", 1, "--late", 2, "--output", output)
    pictures = [tmp_path / name for name in ("pictures/replicas.png", "blocks.png")]
    plots = ("--plot", pictures[0], "--plot-blocks", pictures[1])
    assert run_tool("measure_reduction", "--config", config, *moments, *plots, *keys) == 0
    results = json.loads(output.read_text())
    assert set(results) == {"early", "late"}
    assert all(picture.stat().st_size > 10_000 for picture in pictures)
    for result in results.values():
        for kind, whole in result["replicas"]["64"].items():
            snr, underflow, overflow = (
                [block[key] for block in result["blocks"][kind]]
                for key in ("snr", "underflow", "overflow")
            )
            assert min(snr) <= whole["snr"] <= max(snr)
            # Blocks are alike: the shares of all are the mean of theirs.
            assert whole["underflow"] == pytest.approx(sum(underflow) / 2)
            assert whole["overflow"] == pytest.approx(sum(overflow) / 2)


def test_two_hops(tool, run_distributed, monkeypatch):
    measure = tool("measure_reduction")
    monkeypatch.setattr(measure, "NODE", 2)
    (found, *_), *_ = run_distributed(means_at_owners, 4, E4M3, REPLICATED)  # rank 0 owns the first
    assert torch.equal(found, measure.hierarchical([stored(rank) for rank in range(4)]))
