"""What kernels do to single numbers: encode, decode, magnitudes and scales, as the reference does.

`FORMAT` is the name of a `fp8lm.numerics.Format`. Casts to FP8 are the hardware's, which round to
nearest even, saturate, and keep NaN; numbers are not clamped before them, as `tl.minimum` would
lose the NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8lm.numerics import BF16, E2M5, E4M3, E5M2, FP16, FP32, ROOT_E4M4

INF_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
ONE_BITS = tl.constexpr(0x3F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
ROUND_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # added and subtracted: to nearest even, below 2^22
LARGEST_SCALE = tl.constexpr(2.0**126)
ROOT_BIAS = tl.constexpr(2.0**120)  # of the exponents of fp32 and E4M4
FACTS = tl.constexpr(
    {fmt.name: vars(fmt) for fmt in (E4M3, E5M2, E2M5, ROOT_E4M4, FP16, BF16, FP32)}
)


@triton.constexpr_function
def fact(FORMAT, name):
    """The attribute `name` of the format, known when the kernel is compiled."""
    return FACTS.value[FORMAT][name]


@triton.jit
def magnitude(x):
    """Bits (int32) of the absolute value of fp32 `x`: as integers NaN > Inf > every number."""
    return x.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def scale_of(amax_bits, FORMAT: tl.constexpr):
    """`fp8lm.numerics.scale_from_amax` of the bits of an amax, any shape."""
    if FORMAT == "fp8_e2m5":
        amax = amax_bits.to(tl.float32, bitcast=True)
        quotient = tl.math.div_rn(tl.full(amax.shape, 7.875, tl.float32), amax)
        quotient = tl.minimum(tl.maximum(quotient, 1.0 / LARGEST_SCALE), LARGEST_SCALE)
        bits = quotient.to(tl.int32, bitcast=True)
    else:
        exponent = (_max_bits(FORMAT) - amax_bits) >> 23  # the floor of the log2 of the quotient
        bits = (tl.minimum(tl.maximum(exponent, -126), 126) + 127) << 23
    bits = tl.where(amax_bits >= INF_BITS, NAN_BITS, bits)
    return tl.where(amax_bits == 0, ONE_BITS, bits).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(scale):
    """1 / scale, correctly rounded."""
    return tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def root_of(x):
    """`fp8lm.kernels.root`."""
    return inverse_of(inverse_of(tl.math.sqrt_rn(x)))


@triton.jit
def encode(x, FORMAT: tl.constexpr):
    """fp32 `x` in `FORMAT`, saturated and rounded to nearest even, as stored.

    Of a root format `x` is the root, and so is what `decode` gives.
    """
    if FORMAT == "fp8_e4m3":
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif FORMAT == "fp8_e5m2":
        code = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    elif FORMAT == "fp8_e2m5":
        code = _encode_e2m5(x)
    elif FORMAT == "fp8_e4m4_root":
        code = _encode_root(x)
    elif FORMAT == "fp16":
        code = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x)).to(tl.float16)
    elif FORMAT == "bf16":
        code = x.to(tl.bfloat16)
    else:
        tl.static_assert(FORMAT == "fp32")
        code = x
    return code


@triton.jit
def decode(code, FORMAT: tl.constexpr):
    """The fp32 values of what `encode` makes."""
    if FORMAT == "fp8_e4m3":
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif FORMAT == "fp8_e5m2":
        value = code.to(tl.float8e5, bitcast=True).to(tl.float32)
    elif FORMAT == "fp8_e2m5":
        bits = code.to(tl.int32)  # where fp32 keeps sign, exponent and mantissa; 2^126 of bias
        bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 18)
        value = bits.to(tl.float32, bitcast=True) * LARGEST_SCALE
    elif FORMAT == "fp8_e4m4_root":
        value = (code.to(tl.int32) << 19).to(tl.float32, bitcast=True) * ROOT_BIAS
    else:
        tl.static_assert(FORMAT == "fp16" or FORMAT == "bf16" or FORMAT == "fp32")
        value = code.to(tl.float32)
    return value


@triton.jit
def _max_bits(FORMAT: tl.constexpr):
    """The bits of the largest number of `FORMAT`."""
    if FORMAT == "fp8_e4m3":
        bits = 0x43E00000
    elif FORMAT == "fp8_e5m2":
        bits = 0x47600000
    else:
        tl.static_assert(FORMAT == "fp16")
        bits = 0x477FE000
    return bits


@triton.jit
def _encode_e2m5(x):
    """See `fp8lm.kernels.encoding`: the least of three lines, each of them exact where used."""
    size = tl.minimum(tl.abs(x), 8.0)
    code = _round(size * 32.0)
    code = tl.minimum(code, _round((size - 2.0) * 16.0) + 64.0)
    code = tl.minimum(code, _round((size - 4.0) * 8.0) + 96.0)
    code = tl.where(x == x, tl.minimum(code, 127.0), 0.0).to(tl.int32)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _encode_root(root):
    """See `fp8lm.kernels.encoding`: E4M4, of which no cast gives 0."""
    root = tl.clamp(root, 0.0009765625, 496.0, propagate_nan=tl.PropagateNan.ALL)
    bits = root.to(tl.int32, bitcast=True)
    normal = ((bits + ((bits >> 19) & 1) + 0x3FFFF) >> 19) - 0x780
    subnormal = _round(root * 1024.0).to(tl.int32)
    return tl.where(root < 0.015625, subnormal, normal).to(tl.uint8)


@triton.jit
def _round(x):
    return (x + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
