"""Direct preference optimization (DPO, Rafailov et al., arXiv 2305.18290) and variants.

Of a prompt x with the answers y_w, chosen, and y_l, rejected, pi the model and ref the reference:

    r(y)     = log pi(y | x) - log ref(y | x)              over the answer's tokens
    h        = r(y_w) - r(y_l)
    sigmoid    - (1 - eps) log sigma(beta h) - eps log sigma(-beta h)
    ipo        (h - 1 / (2 beta))^2                        (Azar et al., arXiv 2310.12036)

eps is label smoothing (conservative DPO). `length_normalized` divides the log-probabilities by the
number of answer tokens. `sft_loss_weight` adds as many times - log pi(y_w | x) / |y_w| (as Pang et
al., arXiv 2404.19733).

The loss of a step is the mean over its pairs, on all replicas: a micro-batch divides the sum over
its pairs by the number of all its tokens, as `fp8lm.model.objectives` does, and its share is that
of pairs in tokens.

Shapes: B micro-batch, S sequence, V vocabulary, P pairs of a sample, M = 2 P sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fp8lm.batch import Batch
from fp8lm.model.objectives import LanguageModeling

PreferenceLoss = Literal["sigmoid", "ipo"]
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOG_PROBS = ("logps/chosen", "logps/rejected")
KL = "kl"


@dataclass(frozen=True)
class PreferenceOptimization(LanguageModeling):
    """The loss of pairs whose micro-batches carry the reference's losses.

    Metrics are means over pairs under TRL's names: `rewards/*` are beta r, `rewards/accuracies` the
    share of pairs whose chosen answer has the larger one (a tie is half), `logps/*` the model's
    log-probabilities.
    `kl` estimates the divergence of model and reference: the mean of (log pi/ref)^2 / 2 over answer
    tokens, its second order.
    """

    beta: float = 0.1
    loss_type: PreferenceLoss = "sigmoid"
    label_smoothing: float = 0.0
    length_normalized: bool = False
    sft_loss_weight: float = 0.0

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `Objective`."""
        return (*REWARDS, *LOG_PROBS, KL)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """See `Objective`."""
        return self.loss_and_metrics(output, batch)[0]

    def loss_and_metrics(self, output: Tensor, batch: Batch) -> list[Tensor]:
        """See `Objective`; ValueError for a micro-batch without what the loss needs."""
        if batch.reference_losses is None or batch.sequence_bounds is None:
            raise ValueError("preferences need the reference's losses, and bounds of sequences")
        sequences = Sequences.of(batch)
        losses_BS = self.token_losses(output, batch)
        # Answers are compared by their difference from the reference, token by token: what both
        # have in common, which may be large, does not round the difference.
        gains_BS = batch.reference_losses - losses_BS
        ratios_BP2 = sequences.sums(gains_BS)
        loss_per_token_BP2 = sequences.sums(losses_BS) / sequences.counts
        if self.length_normalized:
            ratios_BP2 = ratios_BP2 / sequences.counts
        margins_BP = ratios_BP2[..., 0] - ratios_BP2[..., 1]
        losses_BP = self._losses(margins_BP)
        if self.sft_loss_weight:
            losses_BP = losses_BP + self.sft_loss_weight * loss_per_token_BP2[..., 0]
        with torch.no_grad():
            rewards_BP2 = self.beta * ratios_BP2
            log_probs_BP2 = -sequences.sums(losses_BS)
            kl_BP = sequences.sums(gains_BS.square() / 2).sum(-1) / sequences.counts.sum(-1)
            reported = (
                *rewards_BP2.unbind(-1),
                self.beta * margins_BP,
                (1 + margins_BP.sign()) / 2,
                *log_probs_BP2.unbind(-1),
                kl_BP,
            )
        means = (losses_BP, *reported)
        return [torch.where(sequences.present, x, 0).sum() / batch.tokens.numel() for x in means]

    def counted_share(self, microbatches: Sequence[Batch]) -> Tensor:
        """See `Objective`: pairs in tokens."""
        shares = [
            Sequences.of(batch).present.sum(dtype=torch.float64) / batch.tokens.numel()
            for batch in microbatches
        ]
        return torch.stack(shares).mean().float()

    def _losses(self, margins_BP: Tensor) -> Tensor:
        if self.loss_type == "ipo":
            return (margins_BP - 1 / (2 * self.beta)).square()
        smoothing, scaled = self.label_smoothing, self.beta * margins_BP
        losses = -(1 - smoothing) * functional.logsigmoid(scaled)
        return losses - smoothing * functional.logsigmoid(-scaled)


@dataclass(frozen=True)
class Sequences:
    """The answers of a micro-batch: `members` [B,M,S], `present` [B,P], `counts` [B,P,2].

    `members` are 1 for the labels of each answer. A pair that is not there has counts of 1.
    """

    members: Tensor
    present: Tensor
    counts: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Sequences:
        """Those of a micro-batch of preferences."""
        assert batch.sequence_bounds is not None
        bounds = batch.sequence_bounds
        places = torch.arange(batch.tokens.shape[1], device=bounds.device)
        begins, ends = bounds[:, :-1, None], bounds[:, 1:, None]
        inside_BMS = (places >= begins) & (places < ends)
        members_BMS = inside_BMS * batch.loss_mask[:, None]
        counts_BP2 = members_BMS.sum(-1).unflatten(1, (-1, 2))
        return cls(members_BMS, (counts_BP2 > 0).all(-1), counts_BP2.clamp(min=1.0))

    def sums(self, values_BS: Tensor) -> Tensor:
        """Of `values_BS` over each answer, [B,P,2]."""
        # Products and sums of rows, in one order: no atomic additions, whose order varies.
        return (self.members * values_BS[:, None]).sum(-1).unflatten(1, (-1, 2))
