"""Stochastic rounding whose noise is a pure function of (key, element index).

Without a random state there is nothing to save or to keep in step: a resumed run and every
layout of the same tensor draw the same noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8lm.numerics import Format

_FP32_MANTISSA_BITS = 23


def noise_bits(index: Tensor, key: Tensor) -> Tensor:
    """Uniform random int32 for every int32 `index`; `key` is a 0-d int32 tensor.

    Multiply-xorshift with C. Wellons' "lowbias32" constants; int32 arithmetic wraps around.
    """
    x = torch.mul(index, -1640531535).bitwise_xor_(key)
    x = _xorshift(x, 16).mul_(0x7FEB352D)
    x = _xorshift(x, 15).mul_(0x846CA68B - (1 << 32))
    return _xorshift(x, 16)


def cast_stochastic(x: Tensor, scale: Tensor, fmt: Format, noise: Tensor) -> Tensor:
    """`x * scale` (fp32) in `fmt`, rounded up with the probability of the distance cut off.

    Random bits are added below the last mantissa bit that `fmt` keeps, and what is below is
    dropped. Saturates; NaN stays NaN; in `fmt`'s subnormal range rounding is to nearest (there
    the format keeps fewer bits than are cut). Payload of dtype `fmt.storage`.
    """
    scaled = torch.mul(x, scale).clamp_(-fmt.max, fmt.max)
    dropped = _FP32_MANTISSA_BITS - fmt.mantissa_bits
    bits = scaled.view(torch.int32)
    rounded = bits.add(noise.bitwise_and((1 << dropped) - 1)).bitwise_and_(-(1 << dropped))
    keep = torch.isfinite(scaled) & (scaled.abs() >= fmt.smallest_normal)
    return torch.where(keep, rounded.view(torch.float32), scaled).to(fmt.dtype).view(fmt.storage)


def _xorshift(x: Tensor, shift: int) -> Tensor:
    # A logical shift: int32's own repeats the sign bit.
    high = x.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)
    return x.bitwise_xor_(high)
