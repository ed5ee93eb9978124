"""One AdamW step over tensors in any storage format: fp32 inside, precision only at the edges.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- (1 - lr wd) w - (lr / bc1) m / (sqrt(v / bc2) + eps)

(FP8-LM, arXiv 2310.18313, section 2.2: precision decoupling.) Every operation is rounded once, in
the order written here: no fused multiply-add, and the root is that of `fp8lm.kernels.root`. So the
bytes do not depend on the backend.

The reference walks a tensor in blocks, so that a step takes little memory beyond the states and, on
a CPU, one pass over it although it is many operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.interface import Kernels
from fp8lm.kernels.root import root
from fp8lm.kernels.rounding import Rounding, cast_rounded, noise_bits
from fp8lm.numerics import Format
from fp8lm.scaled_tensor import ScaledTensor

Factor = float | Tensor


@dataclass(frozen=True)
class AdamFactors:
    """What `adam_` multiplies and adds for one weight: numbers, or 0-d fp32 tensors of them."""

    clip: Factor
    beta1: Factor
    new1: Factor  # 1 - beta1
    beta2: Factor
    new2: Factor  # 1 - beta2
    inverse_correction2: Factor
    eps: Factor
    largest: Tensor | None  # of m / (sqrt(v / bc2) + eps)
    step_size: Factor  # lr / bc1
    decay: Factor  # 1 - lr wd

    @classmethod
    def of(cls, c: AdamCoefficients, weight_decay: float) -> AdamFactors:
        """Those of a step with `c` of a weight with this decay."""
        cut = c.largest_update
        return cls(
            clip=c.clip_factor,
            beta1=c.beta1,
            new1=1.0 - c.beta1,
            beta2=c.beta2,
            new2=1.0 - c.beta2,
            inverse_correction2=c.bias_correction2.reciprocal(),
            eps=c.eps,
            largest=None if cut is None else cut * c.bias_correction1,
            step_size=c.bias_correction1.reciprocal() * c.lr,
            decay=1.0 - c.lr * weight_decay,
        )


def adam_(w: Tensor, g: Tensor, m: Tensor, v: Tensor, f: AdamFactors) -> None:
    """The update itself, in place on fp32 tensors `w`, `m`, `v`."""
    g = g * f.clip
    m.mul_(f.beta1).add_(g * f.new1)
    v.mul_(f.beta2).add_(g.square_().mul_(f.new2))
    denominator = root(v * f.inverse_correction2).add_(f.eps)
    update = m / denominator
    if f.largest is not None:
        update.clamp_(-f.largest, f.largest)
    w.mul_(f.decay).sub_(update.mul_(f.step_size))


def adam_step(
    kernels: Kernels, param: AdamParam, table: AdamTable, c: AdamCoefficients, step_elements: int
) -> Tensor:
    """One step over `param`; payloads are rewritten in place unless `c.skip` is set.

    Returns fp32 [3]: the true amax of new master, m and v (0 where no copy of them has a scale).
    Scales are the caller's to replace afterwards.
    """
    model_scale, factors = table.scales[param.row, 0], AdamFactors.of(c, param.weight_decay)
    needs_amax = [state.format.scaled for state in param.states]
    needs_amax[0] |= param.model_param is not None and param.model_param.format.scaled
    amax = torch.zeros(3, device=table.scales.device)
    for start in range(0, param.gradient.payload.numel(), step_elements):
        block = slice(start, start + step_elements)
        w, m, v = (_read(kernels, state, block, c.skip) for state in param.states)
        g = kernels.dequantize(param.gradient.elements(block.start, block.stop)).view(-1)
        adam_(w, g, m, v, factors)
        for kind, value in enumerate((w, m, v)):
            if needs_amax[kind]:
                amax[kind] = torch.maximum(amax[kind], kernels.amax(value))
        payloads = state_payloads(kernels, param, table, (w, m, v), start)
        for state, payload in zip(param.states, payloads, strict=True):
            _write(payload, state, block, c.skip)
        if param.model_param is not None:
            payload = kernels.cast(w, model_scale, param.model_param.format)
            _write(payload, param.model_param, block, c.skip)
    return amax


def state_payloads(
    kernels: Kernels, param: AdamParam, table: AdamTable, values: Sequence[Tensor], start: int
) -> list[Tensor]:
    """Payloads of new master, m and v, whose elements from `start` on are `values` (fp32, 1-d)."""
    noise = _noise(param, table, start, values[0])
    scales = table.scales[param.row, 1:].unbind()
    return [
        kernels.cast(value, scale, state.format)
        if rounds_to_nearest(state.format, rounding)
        else cast_rounded(value, scale, state.format, rounding, noise)
        for state, value, scale, rounding in zip(
            param.states, values, scales, table.rounding, strict=True
        )
    ]


def rounds_to_nearest(fmt: Format, rounding: Rounding) -> bool:
    """Whether a cast to `fmt` needs no noise."""
    # The subnormals of a format without a scale are far below any moment.
    subnormals = rounding is Rounding.STOCHASTIC_SUBNORMALS
    return rounding is Rounding.NEAREST or (subnormals and not fmt.scaled)


def _noise(param: AdamParam, table: AdamTable, start: int, values: Tensor) -> Tensor:
    """Bits for every element of a block, drawn once for all states; none if all are to nearest."""
    states = zip(param.states, table.rounding, strict=True)
    if all(rounds_to_nearest(state.format, rounding) for state, rounding in states):
        return torch.empty(0, dtype=torch.int32, device=values.device)
    numbers = param.index.numbers(start, values.numel(), values.device)
    return noise_bits(numbers, table.noise_keys[param.row])


def _read(kernels: Kernels, stored: ScaledTensor, block: slice, skip: Tensor | None) -> Tensor:
    values = kernels.dequantize(stored.elements(block.start, block.stop))
    # An fp32 payload dequantizes to itself; a step that may be skipped must not work in place.
    in_place = stored.format.dtype == torch.float32 and skip is not None
    return values.clone() if in_place else values


def _write(payload: Tensor, stored: ScaledTensor, block: slice, skip: Tensor | None) -> None:
    target = stored.payload.view(-1)[block]
    if skip is not None:
        torch.where(skip, target, payload, out=target)
    elif payload.data_ptr() != target.data_ptr():  # else the update was made in place
        target.copy_(payload)
