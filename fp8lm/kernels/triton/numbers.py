"""What kernels do to single numbers."""

from __future__ import annotations

import triton
import triton.language as tl

MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def magnitude(x):
    """Bits (int32) of the absolute value of fp32 `x`: as integers NaN > Inf > every number."""
    return x.to(tl.int32, bitcast=True) & MAGNITUDE
