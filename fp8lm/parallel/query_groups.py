"""Query groups on more tensor-parallel ranks than there are groups, as megatron-core has them.

With t ranks and G < t groups, r = t / G ranks share a group. The rows of its projection,
[q.. | k | v], are sharded over them like those of any other matrix, each row on one rank, so that
gradients, states, norm and checkpoint need no special case:

    rank 0 [q1 q2 k]   rank 1 [k v q3]   ..        forward: the ranks gather [q1 .. qn | k | v]

A rank attends with its n / r queries to the keys and values of the group. In backward it has the
gradients of these queries and a part of those of keys and values; their sums go back to the ranks
that hold the rows. Both are sent in the dtype of activations, as they enter no FP8 GEMM: a rank
sends (r-1) F elements per token in each direction, F being its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp8lm.comm import Wire, all_gather, reduce_scatter
from fp8lm.kernels.interface import Kernels
from fp8lm.numerics import BF16, FP32, Format


@dataclass(frozen=True)
class SharedQueryGroup:
    """The `group` of ranks that share a query group, with its two wires."""

    group: dist.ProcessGroup
    gather_wire: Wire
    reduce_wire: Wire
    kernels: Kernels

    def gather(self, x_SBF: Tensor) -> Tensor:
        """[S,B,F] of every rank -> [S,B,rF], features in rank order."""
        return _GatherFeatures.apply(x_SBF, self)


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBF: Tensor, shared: SharedQueryGroup) -> Tensor:
        ctx.shared = shared
        fmt, size = _format(x_SBF), shared.group.size()
        own = shared.kernels.quantize(x_SBF.contiguous(), fmt)
        gathered = all_gather(own, shared.group, shared.gather_wire).wait().payload
        x_RSBF = gathered.view(x_SBF.dtype).view(size, *x_SBF.shape)
        return x_RSBF.permute(1, 2, 0, 3).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SBF: Tensor) -> tuple[Tensor | None, ...]:
        shared, size = ctx.shared, ctx.shared.group.size()
        dy_RSBF = dy_SBF.unflatten(2, (size, -1)).permute(2, 0, 1, 3)
        summing = reduce_scatter(
            dy_RSBF.flatten(0, 1),
            _format(dy_SBF),
            shared.group,
            shared.reduce_wire,
            shared.kernels,
            dtype=dy_SBF.dtype,
        )
        return summing.wait(), None


def _format(x: Tensor) -> Format:
    return FP32 if x.dtype == torch.float32 else BF16
