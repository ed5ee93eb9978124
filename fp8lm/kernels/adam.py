"""One AdamW step over tensors in any storage format: fp32 inside, precision only at the edges.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- (1 - lr wd) w - lr * (m / bc1) / (sqrt(v / bc2) + eps)

(FP8-LM, arXiv 2310.18313, section 2.2: precision decoupling.) Tensors are walked in blocks of
`kernels.step_elements`, so that a step takes little memory beyond the states and, on a CPU, one
pass over it although it is many operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.numerics import Format


@dataclass(frozen=True)
class AdamCoefficients:
    """Scalars of one step; tensors are 0-d on the device, so that none needs a host sync."""

    beta1: float
    beta2: float
    eps: float
    lr: float
    weight_decay: float
    clip_factor: Tensor  # multiplies the gradient
    bias_correction1: Tensor  # 1 - beta1^step
    bias_correction2: Tensor  # 1 - beta2^step
    skip: Tensor | None  # bool: leave every byte as it is; None: the step is known to happen


@dataclass(frozen=True)
class StoredTensor:
    """A payload, the scale it was written with, and the scale to write it with next."""

    payload: Tensor
    scale: Tensor
    new_scale: Tensor
    format: Format


Cast = Callable[[Tensor, StoredTensor, int], Tensor]


def adam_(w: Tensor, g: Tensor, m: Tensor, v: Tensor, c: AdamCoefficients) -> None:
    """The update itself, in place on fp32 tensors `w`, `m`, `v` (`g` is overwritten too)."""
    g.mul_(c.clip_factor)
    m.lerp_(g, 1.0 - c.beta1)
    v.mul_(c.beta2).addcmul_(g, g, value=1.0 - c.beta2)
    denominator = torch.div(v, c.bias_correction2).sqrt_().add_(c.eps)
    update = torch.div(m, denominator, out=denominator).div_(c.bias_correction1)
    w.mul_(1.0 - c.lr * c.weight_decay).add_(update, alpha=-c.lr)


def adam_step(
    kernels: ReferenceKernels,
    gradient: tuple[Tensor, Tensor, Format],
    states: tuple[StoredTensor, StoredTensor, StoredTensor],
    compute: StoredTensor | None,
    coefficients: AdamCoefficients,
    casts: tuple[Cast, Cast, Cast],
) -> Tensor:
    """One step over a whole tensor; payloads are rewritten in place unless `skip` is set.

    `states` are (master weight, first moment, second moment); `compute` is the copy that GEMMs
    read, None if the master is that copy. `casts` round a block of each state,
    `cast(values, state, first_element)`. Returns fp32 [3]: the true amax of new master, m and v
    (0 where no copy of them has a scale). Scales are the caller's to replace afterwards.
    """
    needs_amax = [state.format.scaled for state in states]
    needs_amax[0] |= compute is not None and compute.format.scaled
    amax = torch.zeros(3, device=gradient[0].device)
    for start in range(0, gradient[0].numel(), kernels.step_elements):
        block = slice(start, start + kernels.step_elements)
        w, m, v = (_read(kernels, state, block, coefficients.skip) for state in states)
        g_payload, g_scale, g_format = gradient
        g = kernels.dequantize(g_payload.view(-1)[block], g_scale, g_format, torch.float32)
        g = g.clone() if g_format.dtype == torch.float32 else g
        adam_(w, g, m, v, coefficients)
        for kind, value in enumerate((w, m, v)):
            if needs_amax[kind]:
                amax[kind] = torch.maximum(amax[kind], kernels.amax(value))
        for cast, state, value in zip(casts, states, (w, m, v), strict=True):
            _write(cast(value, state, start), state, block, coefficients.skip)
        if compute is not None:
            payload = kernels.cast(w, compute.new_scale, compute.format)
            _write(payload, compute, block, coefficients.skip)
    return amax


def _read(
    kernels: ReferenceKernels, stored: StoredTensor, block: slice, skip: Tensor | None
) -> Tensor:
    payload = stored.payload.view(-1)[block]
    values = kernels.dequantize(payload, stored.scale, stored.format, torch.float32)
    # An fp32 payload is decoded to itself; a step that may be skipped must not work in place.
    in_place = stored.format.dtype == torch.float32 and skip is not None
    return values.clone() if in_place else values


def _write(payload: Tensor, stored: StoredTensor, block: slice, skip: Tensor | None) -> None:
    target = stored.payload.view(-1)[block]
    if skip is not None:
        torch.where(skip, target, payload, out=target)
    elif payload.data_ptr() != target.data_ptr():  # else the update was made in place
        target.copy_(payload)
