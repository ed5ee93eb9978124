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

from fp8lm.layers.param import QuantizedParam
from fp8lm.layers.tp_context import TPComm


def embed(ids: Tensor, weight: QuantizedParam, comm: TPComm | None = None) -> Tensor:
    """Rows `ids` (int64, any shape) of the logical `weight` [V,H]; shape [*ids.shape, H].

    `comm` sums over the ranks that hold other rows; it may leave a rank with a part of the first
    dimension of the result, the sequence.
    """
    return _EmbeddingFunction.apply(weight.autograd_proxy, ids, weight, comm or TPComm())


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, autograd_proxy: Tensor, ids: Tensor, weight: QuantizedParam, comm: TPComm
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.comm = weight, comm
        rows, elsewhere = _own_rows(ids.reshape(-1), weight)
        found = functional.embedding(rows, weight.payload)
        if elsewhere is not None:
            found.masked_fill_(elsewhere[:, None], 0.0)
        return comm.reduce(found).wait().view(-1, *ids.shape[1:], found.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None, None]:
        (ids,) = ctx.saved_tensors
        weight, comm = ctx.weight, ctx.comm
        quantizer = comm.wire_quantizer(weight.quantizer, dy.dtype)
        gathered = comm.gather(quantizer(dy.reshape(-1, dy.shape[-1]))).wait()
        dy_TH = weight.kernels.dequantize(gathered, weight.spec.format.dtype)
        rows, elsewhere = _own_rows(ids.reshape(-1), weight)
        if elsewhere is not None:
            dy_TH = dy_TH.masked_fill(elsewhere[:, None], 0.0)
        weight.main_grad.add_rows(rows, dy_TH)
        return None, None, None, None


def _own_rows(ids: Tensor, weight: QuantizedParam) -> tuple[Tensor, Tensor | None]:
    """Rows of this rank's part for `ids`, and a mask of those that lie on another rank."""
    split = weight.spec.shard_spec
    if split.is_whole:
        return ids, None
    count = weight.payload.shape[0]
    rows = ids - split.rank * count
    elsewhere = (rows < 0) | (rows >= count)
    return rows.masked_fill(elsewhere, 0), elsewhere
