"""How many ranks a job has along each parallel axis, and which rank is where.

Ranks are numbered as Megatron does, tensor parallel first, pipeline stages last. Experts are
divided over the ranks that hold replicas of everything else, so there are two views of one job:

    dense     tp, cp, dp, pp            tp x cp x dp x pp = number of processes
    expert    tp, ep, expert_dp, pp     ep x expert_dp = cp x dp

Along its axis a rank's neighbours are `stride` ranks apart, the product of the sizes of the axes
before it: coordinate = rank // stride % size.

Every parameter belongs to a group, "dense" or "expert", whose replicas lie along an axis of its own
(`REPLICA_AXIS`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from fp8lm.config import ParallelConfig
from fp8lm.runtime.errors import InputError

DENSE_ORDER = ("tp", "cp", "dp", "pp")
EXPERT_ORDER = ("tp", "ep", "expert_dp", "pp")

DENSE, EXPERT = "dense", "expert"
REPLICA_AXIS = {DENSE: "dp", EXPERT: "expert_dp"}


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Sizes of the axes. `divide` and `from_config` make them from the number of processes."""

    tp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1

    @classmethod
    def divide(
        cls, world_size: int, *, tp: int = 1, cp: int = 1, ep: int = 1, pp: int = 1
    ) -> ParallelDims:
        """Dims with dp = `world_size` / (tp cp pp); InputError if it does not divide."""
        sizes = {
            "tensor_model_parallel_size": tp,
            "context_parallel_size": cp,
            "pipeline_model_parallel_size": pp,
        }
        if cp == 1:
            del sizes["context_parallel_size"]
        share = math.prod(sizes.values())
        if min(sizes.values()) < 1 or world_size % share:
            raise InputError(
                f"{world_size} process{'es' * (world_size > 1)} cannot be divided by "
                f"{' times '.join(f'{name}={size}' for name, size in sizes.items())}: start a "
                f"multiple of {share}, or change the sizes"
            )
        replicas = world_size // (tp * pp)
        if ep < 1 or replicas % ep:
            raise InputError(
                f"expert_model_parallel_size={ep} does not divide the {replicas} ranks that hold "
                "the same dense parameters: change it, or the number of processes"
            )
        return cls(tp=tp, cp=cp, ep=ep, dp=world_size // share, pp=pp)

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> ParallelDims:
        """The dims of config section `parallel` on `world_size` processes."""
        return cls.divide(
            world_size,
            tp=parallel.tensor_model_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
        )

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def expert_dp(self) -> int:
        """Replicas of every expert."""
        return self.cp * self.dp // self.ep

    def size(self, axis: str) -> int:
        """Ranks along `axis`."""
        return getattr(self, axis)

    def stride(self, axis: str) -> int:
        """Difference in rank of neighbours along `axis`."""
        order = DENSE_ORDER if axis in DENSE_ORDER else EXPERT_ORDER
        return math.prod(self.size(before) for before in order[: order.index(axis)])

    def coordinate(self, rank: int, axis: str) -> int:
        """Position of `rank` along `axis`."""
        return rank // self.stride(axis) % self.size(axis)

    def rank(self, **coordinates: int) -> int:
        """The rank at `coordinates`, by axis of one of the views; those not given are 0."""
        order = _order(list(coordinates))
        return sum(coordinates.get(axis, 0) * self.stride(axis) for axis in order)

    def rank_lists(self, *axes: str) -> list[list[int]]:
        """The ranks of every group whose members differ along `axes` only, in ascending order.

        ValueError for axes that are not of one view.
        """
        within: list[range] = []
        apart: list[range] = []
        for axis in reversed(_order(axes)):  # the outermost varies slowest
            offsets = range(0, self.size(axis) * self.stride(axis), self.stride(axis))
            (within if axis in axes else apart).append(offsets)
        return [
            [first + sum(offset) for offset in product(*within)]
            for first in map(sum, product(*apart))
        ]


def _order(axes: Sequence[str]) -> tuple[str, ...]:
    """The view that has all `axes`."""
    for order in (DENSE_ORDER, EXPERT_ORDER):
        if set(axes) <= set(order):
            return order
    raise ValueError(f"{', '.join(axes)} are not axes of {DENSE_ORDER} or of {EXPERT_ORDER}")
