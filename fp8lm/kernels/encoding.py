"""Codes of the eight-bit formats that torch has no dtype of.

A NaN has no code (it becomes 0 or the largest): it is in the scale alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8lm.numerics import E2M5, Format

# Of ROOT_E4M4: fp32's mantissa is 19 bits longer, its exponent 120 larger.
_SHIFT, _REBIAS = 19, 120 << 4


def encode(scaled: Tensor, fmt: Format) -> Tensor:
    """Codes (uint8) of fp32 values times their scale, to nearest even, saturated."""
    return _encode_e2m5(scaled) if fmt == E2M5 else _encode_root(scaled, fmt)


def decode_root(codes: Tensor) -> Tensor:
    """fp32 roots, times their scale, of codes (uint8) of ROOT_E4M4."""
    bits = codes.to(torch.int32).bitwise_left_shift_(_SHIFT)
    return bits.view(torch.float32) * 2.0**120


def _encode_e2m5(scaled: Tensor) -> Tensor:
    """A code grows linearly in every binade, half as fast as in the one before it.

    So it is the least of three lines: below 2, subnormals included; from 2 to 4; from 4 on. Where a
    line is the least its difference is exact, so that ties are ties.
    """
    size = scaled.abs()
    code = (size * 32.0).round_()
    for start, at, slope in ((2.0, 64.0, 16.0), (4.0, 96.0, 8.0)):
        code = torch.minimum(code, (size - start).mul_(slope).round_().add_(at))
    code = code.clamp_(max=127.0).nan_to_num_(0.0).to(torch.uint8)
    return code.add_(torch.signbit(scaled), alpha=0x80)


def _encode_root(root: Tensor, fmt: Format) -> Tensor:
    """Normal numbers by the bits they begin with, rounded by an addition below those."""
    bits = root.clamp(fmt.min, fmt.max).view(torch.int32)
    even = bits.bitwise_right_shift(_SHIFT).bitwise_and_(1)
    normal = (bits + even).add_((1 << (_SHIFT - 1)) - 1).bitwise_right_shift_(_SHIFT) - _REBIAS
    subnormal = (root * (1.0 / fmt.smallest_subnormal)).round_().clamp_(1, 16).to(torch.int32)
    return torch.where(root < fmt.smallest_normal, subnormal, normal).to(torch.uint8)
