"""Cross-entropy of logits whose vocabulary may lie on several ranks; logits are never gathered.

    loss = log(sum_v exp(logit_v)) - logit_label        gradient = softmax - onehot

Each rank computes the logarithm of its own sum, and the label's logit if it has that row; only
these two numbers per token are exchanged. Everything is fp32 inside. Padding rows of the vocabulary
are left out: the loss does not depend on how much padding a layout needs.

Shapes: T tokens, V rows of the vocabulary on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp8lm.kernels.interface import Kernels
from fp8lm.layers.tp_context import TPContext


def cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, vocab_size: int, tp: TPContext, kernels: Kernels
) -> Tensor:
    """Loss of every token, fp32 [T], the same bits on every rank.

    `logits_TV` (bf16 or fp32) are this rank's, and belong to this function from then on: their
    gradient may take their memory. Labels are below `vocab_size`, the unpadded one.
    """
    return _CrossEntropy.apply(logits_TV, labels_T, vocab_size, tp, kernels)


def likeliest(logits_TV: Tensor, vocab_size: int, tp: TPContext) -> Tensor:
    """The first of the likeliest tokens of every row, int64 [T], the same on every rank.

    `logits_TV` are this rank's. Tokens are below `vocab_size`, the unpadded one.
    """
    first = tp.rank * logits_TV.shape[1]
    own = logits_TV[:, : max(0, vocab_size - first)]
    if own.shape[1]:
        column = own.argmax(dim=1)
        value = own.gather(1, column[:, None])[:, 0].float()
    else:  # a rank that has padding alone
        column = torch.zeros_like(logits_TV[:, 0], dtype=torch.int64)
        value = torch.full_like(column, -torch.inf, dtype=torch.float32)
    value_t, token_t = tp.gather(torch.stack((value, (column + first).float()))).unbind(1)
    return token_t.gather(0, value_t.argmax(dim=0)[None])[0].long()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
        vocab_size: int,
        tp: TPContext,
        kernels: Kernels,
    ) -> Tensor:
        first, count = tp.rank * logits_TV.shape[1], logits_TV.shape[1]
        columns_T = labels_T - first if tp.size > 1 else labels_T
        ctx.kernels, ctx.used = kernels, min(max(vocab_size - first, 0), count)
        losses_T, saved = kernels.cross_entropy(
            logits_TV, columns_T, ctx.used, tp.gather if tp.size > 1 else None
        )
        ctx.save_for_backward(*saved)
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_T: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient = ctx.kernels.cross_entropy_backward(ctx.saved_tensors, dy_T, ctx.used)
        return gradient, None, None, None, None
