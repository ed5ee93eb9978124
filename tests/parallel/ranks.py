"""Tensor-parallel ranks of the tests, and what one process would have."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fp8lm.comm import Wire, WireCounter
from fp8lm.config import PrecisionConfig
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.recipe import Recipe
from fp8lm.parallel import TensorParallel
from fp8lm.parallel.query_groups import SharedQueryGroup

KERNELS = ReferenceKernels()
CPU = torch.device("cpu")
FP32_KEYS = dict(preset="bf16", gemm="fp32", params_dtype="fp32")


def tensor_parallel(*, sequence_parallel=True, gather="fp8", reduce="fp8", query_groups=None):
    """All ranks as one tensor-parallel group, with counters of its own."""
    counter = WireCounter(("tp_gather", "tp_reduce"))
    wires = Wire("tp_gather", gather, counter), Wire("tp_reduce", reduce, counter)
    sharing, ranks = 1, range(dist.get_world_size())
    if query_groups is not None:
        sharing = len(ranks) // query_groups
    shared = None
    if sharing > 1:
        lists = [list(ranks[i : i + sharing]) for i in ranks[::sharing]]
        group, _ = dist.new_subgroups_by_enumeration(lists)
        shared = SharedQueryGroup(group, *wires, KERNELS)
    return TensorParallel(
        group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
        gather_wire=wires[0],
        reduce_wire=wires[1],
        kernels=KERNELS,
        query_group=shared,
    )


def sent(tp):
    """Bytes this rank sent since the last call: (gather, reduce)."""
    counted = tp.gather_wire.counter.take()
    return counted["tp_gather"], counted["tp_reduce"]


def recipe(tp, **precision):
    """The recipe of config keys `precision`."""
    return Recipe.from_config(PrecisionConfig(**precision), KERNELS, CPU, tp)


def random(*shape, seed, dtype=torch.float32):
    """Normal numbers, the same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def own_rows(x, tp):
    """What this rank holds of [T, ...] at a boundary."""
    return x.chunk(tp.size)[tp.rank] if tp.sequence_parallel else x


def error(result, expected):
    """Relative error in the Euclidean norm."""
    result, expected = result.double(), expected.double()
    return ((result - expected).norm() / expected.norm().clamp(min=1e-30)).item()
