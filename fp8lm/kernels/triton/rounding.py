"""Casts by the name of a rounding, with noise of (key, element): `fp8lm.kernels.rounding`."""

from __future__ import annotations

import triton
import triton.language as tl

from fp8lm.kernels.triton.numbers import INF_BITS, encode, fact, root_of


@triton.constexpr_function
def uses_noise(FORMAT, ROUNDING):
    """Whether a cast is not to nearest; subnormals without a scale are far below any moment."""
    return ROUNDING == "stochastic" or (
        ROUNDING == "stochastic_subnormals" and fact(FORMAT, "scaled")
    )


@triton.constexpr_function
def _bits_of_subnormals(FORMAT):
    return min(16, 23 - fact(FORMAT, "mantissa_bits"))


@triton.jit
def element_numbers(start, offsets, section, size, rank, SHARDED: tl.constexpr):
    """`ElementIndex.numbers` (int32, wrapping) of the elements `start + offsets` of a rank.

    `offsets` are those below their count. A section is `section` consecutive elements of the rank,
    and those of all `size` ranks follow each other before its next one: what lies before an element
    and is of other ranks is added to its place.
    """
    number = start.to(tl.int32) + offsets
    if SHARDED:
        # No more than fits in int32, whose division is a fifth of that of int64.
        left = tl.minimum(section - start % section, offsets.shape[0]).to(tl.int32)
        width = tl.minimum(section, offsets.shape[0]).to(tl.int32)
        sections = (start // section).to(tl.int32) + (offsets + (width - left)) // width
        others = sections * (size - 1).to(tl.int32) + rank.to(tl.int32)
        number += others * section.to(tl.int32)
    return number


@triton.jit
def noise_bits(number, key):
    """Uniform random uint32 for every int32 `number`."""
    x = ((number * -1640531535) ^ key).to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def cast_rounded(x, scale, noise, FORMAT: tl.constexpr, ROUNDING: tl.constexpr):
    """`x * scale` (fp32) in `FORMAT`, as stored; `noise` is not used where `uses_noise` is not."""
    if fact(FORMAT, "root"):
        if uses_noise(FORMAT, ROUNDING):
            rounded = _round_root(x, scale, noise, FORMAT)
        else:
            rounded = tl.math.sqrt_rn(x) * scale
    elif uses_noise(FORMAT, ROUNDING):
        rounded = _round_stochastic(x * scale, noise, FORMAT, ROUNDING)
    else:
        rounded = x * scale
    return encode(rounded, FORMAT)


@triton.jit
def _round_stochastic(scaled, noise, FORMAT: tl.constexpr, ROUNDING: tl.constexpr):
    largest: tl.constexpr = fact(FORMAT, "max")
    scaled = tl.clamp(scaled, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    rounded = scaled
    if ROUNDING == "stochastic":
        rounded = _round_normal(scaled, noise, FORMAT)
    if fact(FORMAT, "scaled"):
        is_subnormal = tl.abs(scaled) < fact(FORMAT, "smallest_normal")
        rounded = tl.where(is_subnormal, _round_subnormal(scaled, noise, FORMAT), rounded)
    return rounded


@triton.jit
def _round_normal(scaled, noise, FORMAT: tl.constexpr):
    DROPPED: tl.constexpr = (1 << (23 - fact(FORMAT, "mantissa_bits"))) - 1
    bits = scaled.to(tl.int32, bitcast=True) + (noise & DROPPED).to(tl.int32, bitcast=True)
    rounded = (bits & ~DROPPED).to(tl.float32, bitcast=True)
    return tl.where(scaled == scaled, rounded, scaled)


@triton.jit
def _round_subnormal(scaled, noise, FORMAT: tl.constexpr):
    step: tl.constexpr = fact(FORMAT, "smallest_subnormal")
    # The other half of the noise, and no bit that a sum would round: see the reference.
    BITS: tl.constexpr = _bits_of_subnormals(FORMAT)
    uniform = ((noise >> (32 - BITS)).to(tl.int32).to(tl.float32) + 0.5) * 2.0**-BITS
    return tl.floor(scaled * (1.0 / step) + uniform) * step


@triton.jit
def _round_root(x, scale, noise, FORMAT: tl.constexpr):
    """A root that `FORMAT` holds, whose square is right on average."""
    square = x * scale * scale
    root = root_of(square)
    # The distance of the codes around: the exponent of the root, less the mantissa's bits.
    step = (root.to(tl.int32, bitcast=True) & INF_BITS).to(tl.float32, bitcast=True)
    step = step * 2.0 ** -fact(FORMAT, "mantissa_bits")
    step = tl.maximum(step, fact(FORMAT, "smallest_subnormal"))
    low = tl.floor(tl.math.div_rn(root, step)) * step
    high = low + step
    # Bits of its own: the master weight and the first moment round by those of `noise`.
    mixed = ((noise * 2654435761) >> 8).to(tl.int32)
    uniform = (mixed.to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2^-24
    above, distance = square - low * low, high * high - low * low
    return tl.where(uniform * distance < above, high, low)
