"""Layers of each pipeline stage, its schedule, and the gradient sync of tied embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.distributed as dist

from fp8lm.comm import Wire, all_reduce
from fp8lm.kernels.interface import Kernels
from fp8lm.layers.param import Param
from fp8lm.numerics import FP32
from fp8lm.parallel.pipeline_schedule import (
    Schedule,
    interleaved,
    one_forward_one_backward,
    zero_bubble,
)

WORD_TABLE = "embedding.word_embeddings.weight"


def layer_ranges(
    num_layers: int,
    num_stages: int,
    num_chunks: int = 1,
    first: int | None = None,
    last: int | None = None,
) -> list[range]:
    """Layers of every virtual stage, in the order of the model.

    `first` and `last` set the numbers of the outer stages; the others share the rest evenly.
    ValueError if the layers do not divide.
    """
    parts = num_stages * num_chunks
    counts: list[int | None] = [None] * parts
    if parts > 1:
        counts[0], counts[-1] = first, last
    left = num_layers - sum(count or 0 for count in counts)
    shared = counts.count(None)
    if left < 0 or (shared and (left % shared or left < shared)) or (not shared and left):
        raise ValueError(f"{left} layers do not divide evenly over {shared} pipeline stages")
    ranges, start = [], 0
    for count in counts:
        stop = start + (left // shared if count is None else count)
        ranges.append(range(start, stop))
        start = stop
    return ranges


def schedule_maker(kind: str, num_stages: int, num_chunks: int) -> Callable[[int], Schedule]:
    """Schedules of `kind` ("1f1b" or "zb-h1") for any number of micro-batches."""
    if num_chunks > 1:
        return partial(interleaved, num_stages, num_chunks=num_chunks)
    return partial({"1f1b": one_forward_one_backward, "zb-h1": zero_bubble}[kind], num_stages)


class TiedEmbeddingSync:
    """Sums the gradients of the first and the last stage's copies of one word table."""

    def __init__(
        self, group: dist.ProcessGroup, wire: Wire, kernels: Kernels, weight: Param
    ) -> None:
        self._group, self._wire, self._kernels, self._weight = group, wire, kernels, weight

    def sum_gradients(self) -> None:
        """Replace both fp32 gradients by their sum, the same bits on both stages."""
        accumulator = self._weight.main_grad
        accumulator.zero_if_unused()
        gradient = accumulator.value.payload
        total = all_reduce(gradient, FP32, self._group, self._wire, self._kernels).wait()
        gradient.copy_(total)
