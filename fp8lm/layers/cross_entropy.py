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
from torch.nn import functional

from fp8lm.layers.tp_context import TPContext


def cross_entropy(logits_TV: Tensor, labels_T: Tensor, vocab_size: int, tp: TPContext) -> Tensor:
    """Loss of every token, fp32 [T], the same bits on every rank.

    `logits_TV` (bf16 or fp32) are this rank's; labels are below `vocab_size`, the unpadded one.
    """
    if tp.size == 1:
        logits = logits_TV[:, :vocab_size].float()
        return functional.cross_entropy(logits, labels_T, reduction="none")
    return _SplitCrossEntropy.apply(logits_TV, labels_T, vocab_size, tp)


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, labels_T: Tensor, vocab_size: int, tp: TPContext
    ) -> Tensor:
        first, count = tp.rank * logits_TV.shape[1], logits_TV.shape[1]
        columns = labels_T - first
        elsewhere = (columns < 0) | (columns >= count)
        columns = columns.masked_fill(elsewhere, 0)
        used = min(max(vocab_size - first, 0), count)
        logits = logits_TV.float()
        own_lse = torch.logsumexp(logits[:, :used], dim=1)  # -inf where `used` is 0
        own_target = logits.gather(1, columns[:, None])[:, 0].masked_fill(elsewhere, 0.0)
        lse, target = tp.gather(torch.stack((own_lse, own_target))).unbind(dim=1)
        lse_T = torch.logsumexp(lse, dim=0)
        ctx.save_for_backward(logits_TV, lse_T, columns, elsewhere)
        ctx.used = used
        return lse_T - target.sum(dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_T: Tensor) -> tuple[Tensor, None, None, None]:
        logits_TV, lse_T, columns, elsewhere = ctx.saved_tensors
        gradient = torch.exp(logits_TV.float() - lse_T[:, None])
        gradient[:, ctx.used :] = 0.0
        onehot = (~elsewhere).to(gradient.dtype)
        gradient.scatter_add_(1, columns[:, None], -onehot[:, None])
        return gradient.mul_(dy_T[:, None]).to(logits_TV.dtype), None, None, None
