"""Token and position embeddings, and the output layer that may share the token table.

The table is BF16; its gradient is an fp32 sum over every occurrence of a token, written straight
to the accumulator, so that the tied output layer's gradient and the lookup's meet there.

Shapes: S sequence, B micro-batch, H hidden, V (padded) vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fp8lm.layers.weight import GemmWeight


def embed(ids: Tensor, weight: GemmWeight) -> Tensor:
    """Rows `ids` (int64, any shape) of `weight` [V,H]; shape [*ids.shape, H]."""
    return _EmbeddingFunction.apply(weight.anchor, ids, weight)


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ids: Tensor, weight: GemmWeight) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return functional.embedding(ids, weight.payload)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.weight.grad.add_rows(ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))
        return None, None, None
