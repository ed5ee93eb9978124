"""The number formats a tensor can be stored in.

    format  sign/exponent/mantissa   max      smallest normal   smallest subnormal   scaled
    E4M3    1/4/3                    448      2^-6              2^-9                 yes
    E5M2    1/5/2                    57344    2^-14             2^-16                yes
    E2M5    1/2/5                    7.875    1                 2^-5                 yes
    E4M4    0/4/4 of the root        496^2    2^-12             2^-20                yes
    FP16    1/5/10                   65504    2^-14             2^-24                yes
    BF16    1/8/7                    3.4e38   2^-126            2^-133               no
    FP32    1/8/23                   3.4e38   2^-126            2^-149               no

A *scaled* format has too little range for a tensor's values as they are, so each tensor carries
one fp32 scale (see `fp8lm.numerics.scaling`). BF16 and FP32 carry scale 1, which lets every
buffer, wire and optimizer state treat all alike.

E2M5 (binary8p6 of IEEE P3109, but all codes are finite) is for sums of many terms: two bits of
mantissa more than E4M3, and so little range that it needs a scale per block (see `granularity_of`).
A NaN is in the scale alone. Torch has no dtype of it, and no tensor core multiplies it.

ROOT_E4M4 is for Adam's second moment, which has no sign: it keeps the square root, since squares
have twice the range in powers of two. Its casts never give 0, by which an update would be divided:
what is smaller becomes the smallest code. It, too, has a NaN in the scale alone, and no dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """One storage format; `storage` is the dtype buffers, wires and checkpoints hold.

    Of a `root` format the codes, and so `max` and what follows, are the roots of its values.
    FP8 is stored as uint8: `module.float()`, gloo, numpy and pickle all leave uint8 alone, and
    arithmetic on it by accident is visible, while an FP8 dtype silently loses its scale.
    """

    name: str
    dtype: torch.dtype
    storage: torch.dtype
    max: float
    smallest_normal: float
    smallest_subnormal: float
    mantissa_bits: int
    scaled: bool
    power_of_two_scales: bool = True
    root: bool = False

    @property
    def min(self) -> float:
        """The least code that a cast gives."""
        return self.smallest_subnormal if self.root else -self.max

    @property
    def bytes(self) -> int:
        """Bytes of one element."""
        return self.storage.itemsize

    def __repr__(self) -> str:
        return self.name


E4M3 = Format("fp8_e4m3", torch.float8_e4m3fn, torch.uint8, 448.0, 2.0**-6, 2.0**-9, 3, True)
E5M2 = Format("fp8_e5m2", torch.float8_e5m2, torch.uint8, 57344.0, 2.0**-14, 2.0**-16, 2, True)
E2M5 = Format("fp8_e2m5", torch.uint8, torch.uint8, 7.875, 1.0, 2.0**-5, 5, True, False)
ROOT_E4M4 = Format(
    "fp8_e4m4_root", torch.uint8, torch.uint8, 496.0, 2.0**-6, 2.0**-10, 4, True, root=True
)
FP16 = Format("fp16", torch.float16, torch.float16, 65504.0, 2.0**-14, 2.0**-24, 10, True)
_BF16_MAX = torch.finfo(torch.bfloat16).max
BF16 = Format("bf16", torch.bfloat16, torch.bfloat16, _BF16_MAX, 2.0**-126, 2.0**-133, 7, False)
_FP32_MAX = torch.finfo(torch.float32).max
FP32 = Format("fp32", torch.float32, torch.float32, _FP32_MAX, 2.0**-126, 2.0**-149, 23, False)


def format_by_name(name: str) -> Format:
    """The format a config value such as `fp8_e4m3` names; KeyError if there is none."""
    return {fmt.name: fmt for fmt in (E4M3, E5M2, E2M5, ROOT_E4M4, FP16, BF16, FP32)}[name]
