"""The global gradient norm, and what it decides: clipping and skipping.

    ||g|| = per_token ||sum||     factor = per_token min(1, clip / (||g|| + 1e-6))
    skip = not finite(||g|| and every value)

Gradients are accumulated of the loss summed over the tokens that count, over the number of all;
`per_token` = 1 / (share of tokens that count, of all ranks) makes it their mean. Nothing masked, it
is exactly 1.

The norm takes all weights in all formats together, each once: of a weight that several ranks
hold whole, only the first counts. It reaches FP8 gradients as a factor inside Adam, never by a
second rounding. A NaN or Inf anywhere in any gradient, or a NaN scale, makes the norm non-finite,
so this one number, the same bits on all ranks, also decides whether the step happens; the other
values that travel with it, such as the losses, have to be finite as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.scaled_tensor import ScaledTensor

Exchange = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")
# What a rank sends first: its norm in two floats, and its share of tokens that count.
NUM_LEADING = 3


@dataclass(frozen=True)
class GradientNorm:
    """`norm`, `clip_factor`, `skip`: 0-d tensors; `amax`: fp32 [number of gradients].

    `clip_factor` multiplies the accumulated gradient and has `per_token` in it. `share` (0-d) is
    the mean over the ranks; `maxima` and `values` are what came of `gradient_norm`'s arguments of
    these names.
    """

    norm: Tensor
    clip_factor: Tensor
    skip: Tensor
    amax: Tensor
    per_token: Tensor
    share: Tensor
    maxima: Tensor
    values: Tensor


def alone(values: Tensor) -> Tensor:
    """The exchange of one rank: [n] -> [1, n]."""
    return values[None]


def gradient_norm(
    gradients: Sequence[ScaledTensor | None],
    clip: float,
    kernels: ReferenceKernels,
    *,
    device: torch.device = CPU,
    exchange: Exchange = alone,
    same_shard_ranks: Sequence[int] | None = None,
    norm_owner: Sequence[bool] | None = None,
    share: Tensor | None = None,
    maxima: Tensor | None = None,
    values: Tensor | None = None,
) -> GradientNorm:
    """Norm and amax of all `gradients` in one pass; `clip` 0 means no clipping.

    All are on `device`, and so is what comes of them, even where this rank has no gradient at all.
    `exchange` gathers a vector of every rank that steps the model, [n] -> [ranks, n], once;
    `same_shard_ranks` are the ranks that hold parts of the same weights (default: all). A gradient
    that is None lies elsewhere; one that is not `norm_owner` lies on another rank as well, where it
    counts (default: all count). `share` (0-d fp32) is the share of this rank's tokens that count in
    the loss (default: 1). `maxima` (fp32 [m], not negative) are max-reduced over the ranks, and
    `values` (fp32 [k]) are all-gathered, [ranks, k]: one that is not finite, on any rank, skips the
    step.
    """
    maxima = torch.zeros(0, device=device) if maxima is None else maxima
    values = torch.zeros(0, device=device) if values is None else values
    squares, amaxes = zip(*(_square_and_amax(g, kernels, device) for g in gradients), strict=True)
    if norm_owner is not None:
        # Zero times NaN is NaN: a fault on this rank alone still reaches the norm.
        squares = [s if counts else s * 0.0 for s, counts in zip(squares, norm_owner, strict=True)]
    high, low = _root_in_two_floats(squares)
    leading = torch.stack((high, low, torch.ones_like(high) if share is None else share))
    ranks = exchange(torch.cat((leading, values, torch.stack(amaxes), maxima)))
    # In double precision the mean of equal shares is that share, however many ranks there are.
    share = ranks[:, 2].double().mean()
    per_token = per_counted_token(share).float()
    norm = ranks[:, :2].double().sum(dim=1).square().sum().sqrt().float() * per_token
    factor = (clip / (norm + 1e-6)).clamp(max=1.0) if clip > 0 else torch.ones_like(norm)
    same_shard = (
        ranks
        if same_shard_ranks is None
        else torch.stack([ranks[rank] for rank in same_shard_ranks])
    )
    end = NUM_LEADING + len(values)
    told, largest = ranks[:, NUM_LEADING:end], same_shard[:, end:].amax(dim=0)
    return GradientNorm(
        norm,
        factor * per_token,
        ~(torch.isfinite(norm) & torch.isfinite(told).all()),
        largest[: len(amaxes)],
        per_token,
        share.float(),
        largest[len(amaxes) :],
        told,
    )


def _root_in_two_floats(squares: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The root of the sum, in double precision, as two floats whose sum it is.

    Whatever rank and order they are summed in, the norm is the same float then, and so is every
    byte that depends on the clip factor. The root is sent, because the square of a norm that is a
    float may be none.
    """
    root = torch.stack(tuple(squares)).sum().sqrt()
    high = root.float()
    return high, (root - high.double()).float()


def per_counted_token(share: Tensor) -> Tensor:
    """What a mean over all tokens is multiplied by to be one over the `share` that counts.

    1 where none counts: loss and gradient are zero then, and stay so.
    """
    return torch.where(share == 0, torch.ones_like(share), 1.0 / share)


def _square_and_amax(
    gradient: ScaledTensor | None, kernels: ReferenceKernels, device: torch.device
) -> tuple[Tensor, Tensor]:
    square = torch.zeros((), dtype=torch.float64, device=device)
    amax = torch.zeros((), device=device)
    if gradient is None:
        return square, amax
    flat = gradient.view(-1)
    step = kernels.step_elements
    for start in range(0, flat.shape[0], step):
        block = flat.rows(start, start + step).dequantize(kernels)
        amax = torch.maximum(amax, kernels.amax(block))
        block = block.double()
        square += torch.dot(block, block)
    return square, amax
