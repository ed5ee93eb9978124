"""Collectives under way while the rank computes and reuses memory give the same bits.

On a GPU the ranks share it: gloo moves their bytes through the host.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import (
    all_gather,
    all_gather_values,
    all_reduce,
    max_over_group,
    reduce_scatter,
)
from fp8lm.numerics import E4M3, E5M2
from tests.comm.ranks import KERNELS, same_bits, values, wire

ROWS, COLUMNS = 256, 512


def start_all(rank, device):
    """A tensor, and five collectives of what it holds under way at once."""
    group, used = dist.group.WORLD, wire()
    x = values(rank, ROWS, COLUMNS).to(device)
    handles = [
        all_gather(KERNELS.quantize(x, E4M3, amax=torch.tensor(8.0, device=device)), group, used),
        reduce_scatter(x, E4M3, group, used, KERNELS),
        max_over_group(x[:4].abs(), group, used),
        all_gather_values(KERNELS.quantize(x, E5M2), group, used),
        all_reduce(x, E5M2, group, used, KERNELS),
    ]
    return x, handles


def tensors(results):
    gathered, scattered, amax, values_, reduced = results
    payloads = [q.payload for q in (gathered, *values_)]
    return [x.cpu() for x in (*payloads, scattered, amax, reduced)]


def overlapped(device, repeats):
    rank = dist.get_rank()
    expected = tensors([handle.wait() for handle in start_all(rank, "cpu")[1]])
    # Rank after rank is late, and later still with more to compute.
    weight = values(9, COLUMNS, COLUMNS).to(device) / COLUMNS**0.5
    for repeat in range(repeats):
        x, handles = start_all(rank, device)
        x.fill_(float("nan"))  # what is being sent is not the caller's memory
        y = values(rank, 64, COLUMNS).to(device)
        for _ in range(1 + 5 * ((rank + repeat) % 2)):
            y = y @ weight
            # Freed memory gets used again.
            torch.full((ROWS * COLUMNS,), 255, dtype=torch.uint8, device=device)
        results = tensors([handle.wait() for handle in handles])
        assert all(map(same_bits, results, expected)), repeat
    return y.isfinite().all().item()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_computation_beside_collectives_changes_nothing(run_distributed, world_size, device):
    assert run_distributed(overlapped, world_size, device, 6) == [True] * world_size
