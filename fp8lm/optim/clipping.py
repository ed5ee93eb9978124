"""The global gradient norm, and what it decides: clipping and skipping.

    factor = min(1, clip / (||g|| + 1e-6))            skip = not finite(||g||)

The norm takes all weights in all formats together, each once: of a weight that several ranks
hold whole, only the first counts. It reaches FP8 gradients as a factor inside Adam, never by a
second rounding. A NaN or Inf anywhere in any gradient, or a NaN scale, makes the norm non-finite,
so this one number, the same bits on all ranks, also decides whether the step happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.kernels.adam import BLOCK
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.layers.edge import ALONE, Partition
from fp8lm.scaled_tensor import ScaledTensor


@dataclass(frozen=True)
class GradientNorm:
    """`norm`, `clip_factor`, `skip`: 0-d tensors; `amax`: fp32 [number of gradients]."""

    norm: Tensor
    clip_factor: Tensor
    skip: Tensor
    amax: Tensor


def gradient_norm(
    gradients: Iterable[ScaledTensor],
    clip: float,
    kernels: ReferenceKernels,
    *,
    partition: Partition = ALONE,
    replicated: Sequence[bool] = (),
) -> GradientNorm:
    """Norm and amax of all `gradients` in one pass; `clip` 0 means no clipping.

    Over the ranks of `partition` there is one exchange. `replicated` tells which of the gradients
    are whole on every rank; it is not needed for a partition of one.
    """
    squares, amaxes = zip(*(_square_and_amax(g, kernels) for g in gradients), strict=True)
    if partition.rank > 0:
        # Zero times NaN is NaN: a fault on this rank alone still reaches the norm.
        pairs = zip(squares, replicated, strict=True)
        squares = [square * 0.0 if whole else square for square, whole in pairs]
    counted = torch.stack(list(squares))
    ranks = partition.gather(torch.cat((counted.sum()[None], torch.stack(amaxes))))
    norm = ranks[:, 0].sum().sqrt()
    factor = (clip / (norm + 1e-6)).clamp(max=1.0) if clip > 0 else torch.ones_like(norm)
    return GradientNorm(norm, factor, ~torch.isfinite(norm), ranks[:, 1:].amax(dim=0))


def _square_and_amax(gradient: ScaledTensor, kernels: ReferenceKernels) -> tuple[Tensor, Tensor]:
    square = torch.zeros((), device=gradient.device)
    amax = torch.zeros((), device=gradient.device)
    flat = gradient.view(-1)
    for start in range(0, flat.shape[0], BLOCK):
        block = flat.rows(start, start + BLOCK).dequantize(kernels)
        square += torch.dot(block, block)
        amax = torch.maximum(amax, kernels.amax(block))
    return square, amax
