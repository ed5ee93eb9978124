"""The global gradient norm, clipping and the decision to skip a step.

    ||g|| = per_token ||sum||     clipping = min(1, clip / (||g|| + 1e-6))
    clip_factor = per_token clipping
    skip = not (||g|| clipping < 2^63 and all other scalars are finite)

The accumulated gradient is that of (loss summed over counted tokens) / (number of all tokens).
`per_token` = 1 / (share of counted tokens, over all ranks) turns that into the mean over counted
tokens; it is exactly 1 if no token is masked.

The norm is over all weights in all formats, each counted once: a weight that several ranks hold
whole counts on the first. It reaches FP8 gradients as a factor inside Adam, never by a
second rounding. A NaN or Inf anywhere in any gradient, or a NaN scale, makes the norm non-finite,
so this one number, the same bits on all ranks, also decides whether the step happens; the other
scalars that are exchanged with it, such as the losses, have to be finite as well. AdamW squares
in fp32 what it steps with, so that a finite norm of 2^64 is too large, too, unless it is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.kernels.interface import Kernels
from fp8lm.optim.step_scalars import SharedScalars, StepScalars
from fp8lm.scaled_tensor import ScaledTensor

CPU = torch.device("cpu")
LARGEST = 2.0**63  # of the norm that AdamW steps with: its square, rounded up, is finite in fp32


@dataclass(frozen=True)
class GradientNorm:
    """`norm`, `clip_factor`, `skip`, `per_token`, `share`: 0-d tensors, the same on all ranks.

    `clip_factor` multiplies the accumulated gradient and includes `per_token`. `share` is the mean
    over the ranks. `losses`, `stops` [ranks] and `metrics` [ranks, n] are those of all ranks.
    `amax` (fp32 [number of gradients]) is of this rank's gradients, or after `AdamW.step` of the
    logical ones.
    """

    norm: Tensor
    clip_factor: Tensor
    skip: Tensor
    amax: Tensor
    per_token: Tensor
    share: Tensor
    losses: Tensor
    stops: Tensor
    metrics: Tensor


def single_rank(values: Tensor) -> Tensor:
    """The gather of one rank: [n] -> [1, n]."""
    return values[None]


def gradient_norm(
    gradients: Sequence[ScaledTensor],
    clip: float,
    kernels: Kernels,
    *,
    device: torch.device = CPU,
    gather: Callable[[Tensor], Tensor] = single_rank,
    norm_owner: Tensor | None = None,
    share: Tensor | None = None,
    loss: Tensor | None = None,
    stop: Tensor | None = None,
    metrics: Sequence[Tensor] = (),
) -> GradientNorm:
    """Norm and amax of all `gradients` in one pass; `clip` 0 means no clipping.

    All are on `device`, and so are the results, even where this rank has no gradient at all.
    `norm_owner` (bool, one for each) is False for those that count on another rank (default: all
    count here). `gather` collects a vector of every rank that updates the model.
    `share`, `loss`, `stop` and `metrics` are those of `StepScalars`; a loss or a `stop` that is not
    finite, on any rank, skips the step.
    """
    if gradients:
        squares, amaxes = kernels.square_sums_and_amaxes(gradients)
    else:
        squares = torch.zeros(0, dtype=torch.float64, device=device)
        amaxes = torch.zeros(0, device=device)
    if norm_owner is not None:
        # Zero times NaN is NaN: a fault on this rank alone still reaches the norm.
        squares = squares * norm_owner
    own = StepScalars.of(squares.sum().sqrt(), share, loss, stop, metrics)
    ranks = SharedScalars.unpack(gather(own.pack()))
    per_token = per_counted_token(ranks.token_share).float()
    norm = ranks.norm.float() * per_token
    clipping = (clip / (norm + 1e-6)).clamp(max=1.0) if clip > 0 else torch.ones_like(norm)
    return GradientNorm(
        norm=norm,
        clip_factor=clipping * per_token,
        skip=~((norm * clipping < LARGEST) & ranks.finite),  # no NaN is less
        amax=amaxes,
        per_token=per_token,
        share=ranks.token_share.float(),
        losses=ranks.losses,
        stops=ranks.stops,
        metrics=ranks.metrics,
    )


def per_counted_token(share: Tensor) -> Tensor:
    """The factor from a mean over all tokens to a mean over the `share` that counts.

    1 if none counts: loss and gradient are zero then, and stay zero.
    """
    return torch.where(share == 0, torch.ones_like(share), 1.0 / share)
