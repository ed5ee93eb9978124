"""Rounding by name, and stochastic rounding whose noise is a pure function of (key, element).

Without a random state there is nothing to save or to keep in step: a resumed run and every
layout of the same tensor draw the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from fp8lm.kernels.encoding import encode
from fp8lm.kernels.root import root
from fp8lm.numerics import Format
from fp8lm.numerics.scaling import float_bits

_FP32_MANTISSA_BITS = 23
_INF_BITS = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF
_SIGN_PLACE = 31
_SIGN_BIT = 1 << _SIGN_PLACE


class Rounding(Enum):
    """How a value is rounded to its format; `STOCHASTIC_SUBNORMALS`: only those, others nearest."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"
    STOCHASTIC_SUBNORMALS = "stochastic_subnormals"


@dataclass(frozen=True)
class ElementIndex:
    """Numbers the elements of a part of a logical tensor by their place in the whole.

    Rows of `inner` elements lie in sections of `size * block` rows, of which the rank holds `block`
    from row `rank * block` on (rows and sections of several outer dimensions follow each other).
    `first` is the number of the part's first element among those that the rank holds.
    """

    first: int = 0
    block: int = 1
    inner: int = 1
    rank: int = 0
    size: int = 1

    def numbers(self, start: int, count: int, device: torch.device) -> Tensor:
        """Those (int32, wrapping) of elements `start` to `start + count` of the part."""
        first = self.first + start
        if self.size == 1:
            local = torch.arange(count, dtype=torch.int32, device=device)
            return local.add_((first + _SIGN_BIT) % (2 * _SIGN_BIT) - _SIGN_BIT)
        local = torch.arange(first, first + count, device=device)
        position, offset = local // self.inner, local % self.inner
        section, row = position // self.block, position % self.block
        position = (section * self.size + self.rank) * self.block + row
        return (position * self.inner + offset).to(torch.int32)


def noise_bits(index: Tensor, key: Tensor | int) -> Tensor:
    """Uniform random int32 for every int32 `index`; `key` is an int32 number or tensor.

    A tensor of keys broadcasts to the shape of `index`.

    Multiply-xorshift with C. Wellons' "lowbias32" constants; int32 arithmetic wraps around.
    """
    x = torch.mul(index, -1640531535).bitwise_xor_(key)
    x = _xorshift(x, 16).mul_(0x7FEB352D)
    x = _xorshift(x, 15).mul_(0x846CA68B - (1 << 32))
    return _xorshift(x, 16)


def cast_rounded(
    x: Tensor, scale: Tensor, fmt: Format, rounding: Rounding, noise: Tensor
) -> Tensor:
    """`cast_stochastic` as `rounding` says, which is not `NEAREST`."""
    only = rounding is Rounding.STOCHASTIC_SUBNORMALS
    return cast_stochastic(x, scale, fmt, noise, subnormals_only=only)


def cast_stochastic(
    x: Tensor, scale: Tensor, fmt: Format, noise: Tensor, *, subnormals_only: bool = False
) -> Tensor:
    """The numbers of `round_stochastically` as stored; payload of dtype `fmt.storage`."""
    rounded = round_stochastically(x, scale, fmt, noise, subnormals_only=subnormals_only)
    if fmt.root:
        return encode(rounded, fmt)
    return rounded.to(fmt.dtype).view(fmt.storage)


def round_stochastically(
    x: Tensor, scale: Tensor, fmt: Format, noise: Tensor, *, subnormals_only: bool = False
) -> Tensor:
    """`x * scale` (fp32) rounded up with the probability of the distance cut off, in fp32.

    Random bits are added below the last mantissa bit that `fmt` keeps, and what is below is
    dropped. With `subnormals_only`, numbers that `fmt` holds with its full precision are left for
    its cast to round to nearest. Of a root format the squares are right on average. Saturates; NaN
    stays NaN.
    """
    if fmt.root:
        return _round_root(x, scale, fmt, noise)
    scaled = torch.mul(x, scale).clamp_(-fmt.max, fmt.max)
    normal = scaled if subnormals_only else _round_normal(scaled, fmt, noise)
    if not fmt.scaled:  # the exponents of fp32, and so the same bits to drop among its subnormals
        return normal
    return _choose(scaled, fmt, _round_subnormal(scaled, fmt, noise), normal)


def _round_normal(scaled: Tensor, fmt: Format, noise: Tensor) -> Tensor:
    dropped = _FP32_MANTISSA_BITS - fmt.mantissa_bits
    bits = noise.bitwise_and((1 << dropped) - 1).add_(scaled.view(torch.int32))
    rounded = bits.bitwise_and_(-(1 << dropped)).view(torch.float32)
    return rounded.sub_(scaled - scaled)  # of NaN; else of 0, which leaves -0.0 what it is


def _choose(scaled: Tensor, fmt: Format, subnormal: Tensor, normal: Tensor) -> Tensor:
    """`subnormal` where `fmt` has fewer bits than its mantissa's, else (and of NaN) `normal`.

    Eager PyTorch on a CPU has vectors for arithmetic on floats and integers, and takes one element
    after another for comparisons and `where`: there it chooses by masks, in the memory of both.
    """
    if scaled.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(scaled.abs() < fmt.smallest_normal, subnormal, normal)
    size = scaled.view(torch.int32).bitwise_and(_MAGNITUDE)
    mask = size.sub_(float_bits(fmt.smallest_normal)).bitwise_right_shift_(_SIGN_PLACE)
    bits = normal.view(torch.int32)
    chosen = subnormal.view(torch.int32).bitwise_xor_(bits).bitwise_and_(mask)
    return chosen.bitwise_xor_(bits).view(torch.float32)


def _round_subnormal(scaled: Tensor, fmt: Format, noise: Tensor) -> Tensor:
    # The other half of the noise: the master weight's lower bits use the lower one. Of FP16 fewer
    # bits: 1023 steps and 1 - 2^-17 are 1024 in fp32, and a number of the format would move.
    bits = min(16, _FP32_MANTISSA_BITS - fmt.mantissa_bits)
    uniform = noise.bitwise_right_shift(32 - bits).bitwise_and_((1 << bits) - 1).float()
    uniform = uniform.add_(0.5).mul_(2.0**-bits)
    steps = torch.mul(scaled, 1.0 / fmt.smallest_subnormal).add_(uniform).floor_()
    return steps.mul_(fmt.smallest_subnormal)


def _round_root(x: Tensor, scale: Tensor, fmt: Format, noise: Tensor) -> Tensor:
    """Roots that `fmt` holds, whose squares are right on average: no mean of squares grows."""
    square = torch.mul(x, scale).mul_(scale)
    exact = root(square)
    # The distance of the codes around: the exponent of the root, less the mantissa's bits.
    step = exact.view(torch.int32).bitwise_and(_INF_BITS).view(torch.float32)
    step = step.mul_(2.0**-fmt.mantissa_bits).clamp_(min=fmt.smallest_subnormal)
    low = torch.div(exact, step).floor_().mul_(step)
    high = low + step
    # Bits of its own: the master weight and the first moment round by those of `noise`.
    mixed = torch.mul(noise, -1640531535).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    uniform = mixed.float().add_(0.5).mul_(2.0**-24)
    above, distance = square - low.square(), high.square() - low.square()
    goes_up = uniform.mul_(distance).lt_(above)  # 1.0 or 0.0
    return goes_up.mul_(step).add_(low)


def _xorshift(x: Tensor, shift: int) -> Tensor:
    # A logical shift: int32's own repeats the sign bit.
    high = x.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)
    return x.bitwise_xor_(high)
