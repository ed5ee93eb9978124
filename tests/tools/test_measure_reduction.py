"""What the tool computes on one process is what several processes do, bit for bit."""

from __future__ import annotations

import torch

from fp8lm.numerics import E4M3
from tests.gradient.test_hierarchical import REPLICATED, means_at_owners, stored


def test_two_hops(tool, run_distributed, monkeypatch):
    measure = tool("measure_reduction")
    monkeypatch.setattr(measure, "NODE", 2)
    (found, *_), *_ = run_distributed(means_at_owners, 4, E4M3, REPLICATED)  # rank 0 owns the first
    assert torch.equal(found, measure.hierarchical([stored(rank) for rank in range(4)]))
