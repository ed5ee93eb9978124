"""How much each token counts in the loss of a step.

    loss = sum_t mask_t l_t / sum_t mask_t        t over all tokens of the step, on all replicas

Backward begins before a rank knows how many tokens count elsewhere. So each micro-batch takes the
sum of its counted tokens over the number of *all* its tokens, which is the same everywhere, and
the share of tokens that count is one of the step's scalars: the optimizer divides by its mean,
which is exactly 1 where nothing is masked. How a batch is cut into micro-batches, replicas and
stages then changes its gradient by roundings alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def counted_share(microbatches: Sequence[Batch]) -> Tensor:
    """Share of the tokens of `microbatches`, all of one size, that the loss counts (0-d fp32)."""
    # Counts are exact in double precision, so that the share is 1 where nothing is masked.
    shares = [batch["loss_mask"].mean(dtype=torch.float64) for batch in microbatches]
    return torch.stack(shares).mean().float()


def weigh_alike(microbatches: Sequence[Batch]) -> list[Batch]:
    """`microbatches` with masks by which each counts the same, however many tokens it counts.

    The loss is then the mean of their means, as in Megatron-LM without --calculate-per-token-loss.
    """
    return [batch | {"loss_mask": _normalized(batch["loss_mask"])} for batch in microbatches]


def _normalized(mask: Tensor) -> Tensor:
    return mask * (mask.numel() / mask.sum().clamp(min=1.0))  # all masked: zeros, not NaN
