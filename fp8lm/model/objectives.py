"""Training objectives: the loss of a model's output.

    loss = sum_t mask_t l_t / sum_t mask_t        t over all tokens of the step, on all replicas

Backward begins before a rank knows how many tokens count on others. So each micro-batch divides the
sum over its counted tokens by the number of *all* its tokens, which is the same everywhere, and the
share of counted tokens is one of the step's scalars: the optimizer divides by its mean, which is
exactly 1 if no token is masked. The split of a batch into micro-batches, replicas and stages then
changes its gradient by rounding only.

Shapes: B micro-batch, S sequence, V padded vocabulary (this rank's part of it), T = S B tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fp8lm.batch import Batch
from fp8lm.kernels import Kernels, ReferenceKernels
from fp8lm.layers.cross_entropy import cross_entropy
from fp8lm.layers.tp_context import NO_TP, TPContext


class Objective(Protocol):
    """The loss of a micro-batch, and the share of its tokens that count."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Sum over counted tokens / number of all tokens (0-d fp32); `output` is the model's."""

    def counted_share(self, microbatches: Sequence[Batch]) -> Tensor:
        """Share of `microbatches`, all of one size, that the loss counts (0-d fp32)."""


@dataclass(frozen=True)
class LanguageModeling:
    """Predict the label of every token that the mask counts: cross-entropy in fp32, in nats.

    `num_ids` is the size of the vocabulary without padding (default: all rows are tokens). The
    loss is the same on all ranks of `tp`, over which the vocabulary is split.
    """

    num_ids: int | None = None
    tp: TPContext = NO_TP
    kernels: Kernels = field(default_factory=ReferenceKernels)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """See `Objective`; `output` are logits [S, B, V] in the dtype of activations.

        Backward may leave their gradient in their memory.
        """
        logits_TV = output.flatten(0, 1)
        num_ids = logits_TV.shape[1] * self.tp.size if self.num_ids is None else self.num_ids
        labels_T = batch.labels.t().reshape(-1)
        losses_T = cross_entropy(logits_TV, labels_T, num_ids, self.tp, self.kernels)
        mask = batch.loss_mask
        return torch.dot(losses_T, mask.t().reshape(-1)) / mask.numel()

    def counted_share(self, microbatches: Sequence[Batch]) -> Tensor:
        """See `Objective`."""
        # Counts are exact in double precision, so that the share is 1 where nothing is masked.
        shares = [batch.loss_mask.mean(dtype=torch.float64) for batch in microbatches]
        return torch.stack(shares).mean().float()


@dataclass(frozen=True)
class MeanOfMicrobatches:
    """`objective`, with the same weight for every micro-batch, however many tokens it counts.

    The loss is then the mean of their means, as in Megatron-LM without --calculate-per-token-loss.
    """

    objective: Objective

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """See `Objective`; divided by the number of counted tokens."""
        mask = batch.loss_mask
        # All masked: zeros, not NaN.
        mean = mask * (mask.numel() / mask.sum().clamp(min=1.0))
        return self.objective.loss(output, replace(batch, loss_mask=mean))

    def counted_share(self, microbatches: Sequence[Batch]) -> Tensor:
        """See `Objective`: 1."""
        return torch.ones((), device=microbatches[0].loss_mask.device)
