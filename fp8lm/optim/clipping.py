"""The global gradient norm, and what it decides: clipping and skipping.

    factor = min(1, clip / (||g|| + 1e-6))            skip = not finite(||g||)

The norm takes all weights in all formats together, each once. It reaches FP8 gradients as a
factor inside Adam, never by a second rounding. A NaN or Inf anywhere in any gradient, or a NaN
scale, makes the norm non-finite, so this one number also decides whether the step happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.kernels.adam import BLOCK
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.scaled_tensor import ScaledTensor


@dataclass(frozen=True)
class GradientNorm:
    """`norm`, `clip_factor`, `skip`: 0-d tensors; `amax`: fp32 [number of gradients]."""

    norm: Tensor
    clip_factor: Tensor
    skip: Tensor
    amax: Tensor


def gradient_norm(
    gradients: Iterable[ScaledTensor], clip: float, kernels: ReferenceKernels
) -> GradientNorm:
    """Norm and amax of all `gradients` in one pass; `clip` 0 means no clipping."""
    squares, amaxes = zip(*(_square_and_amax(g, kernels) for g in gradients), strict=True)
    norm = torch.stack(squares).sum().sqrt()
    factor = (clip / (norm + 1e-6)).clamp(max=1.0) if clip > 0 else torch.ones_like(norm)
    return GradientNorm(norm, factor, ~torch.isfinite(norm), torch.stack(amaxes))


def _square_and_amax(gradient: ScaledTensor, kernels: ReferenceKernels) -> tuple[Tensor, Tensor]:
    square = torch.zeros((), device=gradient.device)
    amax = torch.zeros((), device=gradient.device)
    flat = gradient.view(-1)
    for start in range(0, flat.shape[0], BLOCK):
        block = flat.rows(start, start + BLOCK).dequantize(kernels)
        square += torch.dot(block, block)
        amax = torch.maximum(amax, kernels.amax(block))
    return square, amax
