"""Casts between float formats as a GPU does them, for Triton's interpreter.

Its own round half up, lose carries, truncate to bf16 and make numbers of NaN. These are PyTorch's
casts, saturated as `cvt.rn.satfinite` saturates FP8, whose NaN has no sign.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl

DTYPES = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
FP8_NAN = 0x7F


def convert_float(bits, source, target, rounding):
    """Replaces `triton.runtime.interpreter._convert_float`: bit patterns in, bit patterns out."""
    values = _tensor(bits, source).view(DTYPES[source])
    if target in (tl.float8e4nv, tl.float8e5):
        codes = _to_fp8(values, DTYPES[target])
    else:
        codes = values.to(DTYPES[target])
    unsigned = np.dtype(f"uint{target.primitive_bitwidth}")
    signed = getattr(torch, f"int{target.primitive_bitwidth}") if unsigned.itemsize > 1 else None
    return codes.view(signed or torch.uint8).numpy().view(unsigned).reshape(bits.shape)


def _tensor(bits, source):
    signed = np.dtype(
        f"{'u' if source.primitive_bitwidth == 8 else ''}int{source.primitive_bitwidth}"
    )
    return torch.from_numpy(np.ascontiguousarray(bits).reshape(-1).view(signed).copy())


def _to_fp8(values, dtype):
    largest = torch.finfo(dtype).max
    codes = values.float().clamp(-largest, largest).to(dtype).view(torch.uint8)
    return codes.masked_fill(values.isnan(), FP8_NAN)
