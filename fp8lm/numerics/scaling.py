"""From an absolute maximum to a scale.

    scale = 2^floor(log2(format_max / amax))    payload = cast(x * scale)    x ~ payload / scale

Powers of two make a change of scale an exponent shift: exact outside subnormals and saturation.
E2M5's is format_max / amax itself. It uses the narrow range whole; and as long as the amax of a sum
grows, the grid moves with every term, so that what is below half a step is not rounded away every
time. (Where one early spike is the amax, the grid stays.)
Three special cases, none of them silent:

    amax = 0           scale 1 (there is nothing to scale); of a root format the largest, 2^126
    amax tiny          the exponent is clamped to 2^+-126, so that 1/scale is a normal fp32 number
    amax Inf or NaN    scale NaN: everything dequantized with it is NaN, so the event reaches loss
                       and gradient norm without a flag or a host synchronisation

A root format stores its smallest code for 0. With scale 1 that would be a number, 2^-20, by which
the gradients that come later are divided; with the largest it is 0 in fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8lm.numerics.formats import Format

_EXPONENT_SHIFT = 23
_EXPONENT_BIAS = 127
_MAX_EXPONENT = 126
_INF_BITS = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF


def scale_from_amax(amax: Tensor, fmt: Format) -> Tensor:
    """Scales for absolute maxima `amax` (fp32, any shape); same shape, fp32.

    Exact on every device: no transcendental, no root, a division only where the format wants it.
    """
    if not fmt.scaled:
        return torch.ones_like(amax)
    # Without the sign: -0.0 is zero, and x86 makes the NaN of Inf * 0 negative.
    bits = amax.view(torch.int32) & _MAGNITUDE
    scale = _power_of_two(bits, fmt) if fmt.power_of_two_scales else _quotient(amax, fmt)
    scale = scale.masked_fill_(bits >= _INF_BITS, float("nan"))
    return scale.masked_fill_(bits == 0, 2.0**_MAX_EXPONENT if fmt.root else 1.0)


def largest_value(scale: Tensor, fmt: Format) -> Tensor:
    """The largest value that `fmt` holds with `scale` (fp32, any shape); same shape."""
    largest = fmt.max / scale
    return largest.square() if fmt.root else largest


def _power_of_two(bits: Tensor, fmt: Format) -> Tensor:
    """The largest power of two that takes a number of these `bits`, or its root, to `fmt.max`.

    The integer difference of two positive floats, shifted right by the mantissa, is the floor of
    the log2 of their ratio. That of a root is half of it, rounded down: one place more.
    """
    largest, shift = fmt.max, _EXPONENT_SHIFT
    if fmt.root:
        largest, shift = fmt.max**2, _EXPONENT_SHIFT + 1
    exponent = (float_bits(largest) - bits) >> shift
    exponent = exponent.clamp_(-_MAX_EXPONENT, _MAX_EXPONENT)
    return ((exponent + _EXPONENT_BIAS) << _EXPONENT_SHIFT).view(torch.float32)


def _quotient(amax: Tensor, fmt: Format) -> Tensor:
    """`fmt.max / amax`, whose inverse is a normal number as well."""
    largest = 2.0**_MAX_EXPONENT
    return torch.div(fmt.max, amax.abs()).clamp_(1.0 / largest, largest)


def float_bits(value: float) -> int:
    """The bits of a positive normal fp32 number; PyTorch's compiler knows `frexp`, not `struct`."""
    mantissa, exponent = math.frexp(value)  # value = mantissa 2^exponent, mantissa in [0.5, 1)
    fraction = int((2.0 * mantissa - 1.0) * (1 << _EXPONENT_SHIFT))
    return ((exponent - 1 + _EXPONENT_BIAS) << _EXPONENT_SHIFT) + fraction
