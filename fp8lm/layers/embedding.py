"""Token and position embeddings, whose rows may lie on several ranks.

The table is BF16; its gradient is an fp32 sum over every occurrence of a token, written straight
to the accumulator, so that the tied output layer's gradient and the lookup's meet there. A rank
that holds some of the rows looks those up and takes zeros for all others; the sum over ranks is
the lookup: exact on a BF16 wire, and rounded once to E4M3 on an FP8 one.

Shapes: S sequence, B micro-batch, H hidden, V (padded) vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fp8lm.layers.edge import Edge
from fp8lm.layers.weight import GemmWeight


def embed(ids: Tensor, weight: GemmWeight, edge: Edge | None = None) -> Tensor:
    """Rows `ids` (int64, any shape) of the logical `weight` [V,H]; shape [*ids.shape, H].

    `edge` sums over the ranks that hold other rows; it may leave a rank with a part of the first
    dimension of the result, the sequence.
    """
    return _EmbeddingFunction.apply(weight.anchor, ids, weight, edge or Edge())


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ids: Tensor, weight: GemmWeight, edge: Edge) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.edge = weight, edge
        rows, elsewhere = _own_rows(ids.reshape(-1), weight)
        found = functional.embedding(rows, weight.payload)
        if elsewhere is not None:
            found.masked_fill_(elsewhere[:, None], 0.0)
        return edge.reduce(found, weight.kernels).wait().view(-1, *ids.shape[1:], found.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None, None]:
        (ids,) = ctx.saved_tensors
        weight, edge, kernels = ctx.weight, ctx.edge, ctx.weight.kernels
        fmt = weight.spec.format
        sent = edge.cast(dy.reshape(-1, dy.shape[-1]), fmt, kernels)
        dy_TH = edge.gather(sent, fmt, kernels).wait().payload
        rows, elsewhere = _own_rows(ids.reshape(-1), weight)
        if elsewhere is not None:
            dy_TH = dy_TH.masked_fill(elsewhere[:, None], 0.0)
        weight.grad.add_rows(rows, dy_TH)
        return None, None, None, None


def _own_rows(ids: Tensor, weight: GemmWeight) -> tuple[Tensor, Tensor | None]:
    """Rows of this rank's part for `ids`, and a mask of those that lie on another rank."""
    split = weight.spec.split
    if split.is_whole:
        return ids, None
    count = weight.payload.shape[0]
    rows = ids - split.rank * count
    elsewhere = (rows < 0) | (rows >= count)
    return rows.masked_fill(elsewhere, 0), elsewhere
