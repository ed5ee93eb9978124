"""Training objectives: the loss of a model's output.

    loss = sum_t mask_t l_t / sum_t mask_t        t over all tokens of the step, on all replicas

Backward begins before a rank knows how many tokens count on others. So each micro-batch divides the
sum over its counted tokens by the number of *all* its tokens, which is the same everywhere, and the
share of counted tokens is one of the step's scalars: the optimizer divides by its mean, which is
exactly 1 if no token is masked. The split of a batch into micro-batches, replicas and stages then
changes its gradient by rounding only. Metrics that an objective reports beside its loss follow the
same rule.

Shapes: B micro-batch, S sequence, V padded vocabulary (this rank's part of it), T = S B tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fp8lm.batch import Batch
from fp8lm.kernels import Kernels, ReferenceKernels
from fp8lm.layers.cross_entropy import cross_entropy, likeliest
from fp8lm.layers.tp_context import NO_TP, TPContext

ACCURACY = "token accuracy"


class Objective(ABC):
    """The loss of a micro-batch, the share of its tokens that count, and metrics."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `loss_and_metrics` gives beside the loss."""
        return ()

    @abstractmethod
    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Sum over counted tokens / number of all tokens (0-d fp32); `output` is the model's."""

    def loss_and_metrics(self, output: Tensor, batch: Batch) -> list[Tensor]:
        """The loss, which alone has a gradient, and the metrics (0-d fp32)."""
        return [self.loss(output, batch)]

    def counted_share(self, microbatches: Sequence[Batch]) -> Tensor:
        """Share of `microbatches`, all of one size, that the loss counts (0-d fp32); here all."""
        return torch.ones((), device=microbatches[0].tokens.device)

    def for_evaluation(self) -> Objective:
        """The objective of held-out data, which may report more."""
        return self


@dataclass(frozen=True)
class LanguageModeling(Objective):
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
        mask = batch.loss_mask
        return torch.dot(self._losses_T(output, batch), mask.t().reshape(-1)) / mask.numel()

    def token_losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of every label, fp32 [B, S]; see `loss` for the gradient."""
        samples, length = batch.labels.shape
        return self._losses_T(output, batch).view(length, samples).t()

    def _losses_T(self, output: Tensor, batch: Batch) -> Tensor:
        logits_TV = output.flatten(0, 1)
        num_ids = logits_TV.shape[1] * self.tp.size if self.num_ids is None else self.num_ids
        labels_T = batch.labels.t().reshape(-1)
        return cross_entropy(logits_TV, labels_T, num_ids, self.tp, self.kernels)

    def counted_share(self, microbatches: Sequence[Batch]) -> Tensor:
        """See `Objective`."""
        # Counts are exact in double precision, so that the share is 1 where nothing is masked.
        shares = [batch.loss_mask.mean(dtype=torch.float64) for batch in microbatches]
        return torch.stack(shares).mean().float()


@dataclass(frozen=True)
class AnswerModeling(LanguageModeling):
    """Predict the tokens of answers; on held-out data, also how many are the likeliest.

    `token accuracy` is the share of counted labels that the model finds likeliest.
    """

    reports_accuracy: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `Objective`."""
        return (ACCURACY,) if self.reports_accuracy else ()

    def loss_and_metrics(self, output: Tensor, batch: Batch) -> list[Tensor]:
        """See `Objective`."""
        if not self.reports_accuracy:
            return super().loss_and_metrics(output, batch)
        logits_TV, mask_T = output.detach().flatten(0, 1), batch.loss_mask.t().reshape(-1)
        num_ids = logits_TV.shape[1] * self.tp.size if self.num_ids is None else self.num_ids
        right_T = likeliest(logits_TV, num_ids, self.tp) == batch.labels.t().reshape(-1)
        accuracy = torch.dot(right_T.float(), mask_T) / mask_T.numel()
        return [self.loss(output, batch), accuracy]

    def for_evaluation(self) -> AnswerModeling:
        """See `Objective`."""
        return replace(self, reports_accuracy=True)


@dataclass(frozen=True)
class MeanOfMicrobatches(Objective):
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
