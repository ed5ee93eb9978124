"""Stochastic rounding: only neighbours, unbiased, and noise that is a function of (key, index)."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.rounding import cast_stochastic, noise_bits
from fp8lm.numerics import BF16, E4M3, E5M2, FP16, FP32
from fp8lm.scaled_tensor import ScaledTensor

KERNELS = ReferenceKernels()
FORMATS = [E4M3, E5M2, FP16, BF16]
ONE = torch.ones(())


def indices(count, start=0):
    return torch.arange(start, start + count, dtype=torch.int32)


def noise(count, key, start=0):
    return noise_bits(indices(count, start), torch.tensor(key, dtype=torch.int32))


def rounded(x, fmt, key, scale=1.0):
    scale = torch.tensor(scale)
    payload = cast_stochastic(x, scale, fmt, noise(x.numel(), key).view(x.shape))
    return KERNELS.dequantize(ScaledTensor(payload, scale, fmt))


def normal_numbers(fmt, count=2000):
    """Random numbers of all magnitudes between smallest normal and maximum of `fmt`."""
    generator = torch.Generator().manual_seed(0)
    low, high = math.log2(fmt.smallest_normal), math.log2(fmt.max)
    low, high = max(low, -60.0), min(high, 60.0)
    magnitude = torch.rand(count, generator=generator) * (high - low) + low
    sign = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
    return sign * 2.0**magnitude


def neighbours(x, fmt):
    """The numbers of `fmt` on both sides of normal numbers `x`, in float64."""
    x = x.double()
    ulp = 2.0 ** (torch.floor(torch.log2(x.abs())) - fmt.mantissa_bits)
    low = torch.floor(x / ulp) * ulp
    return low, low + ulp


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("key", [0, 1, -7, 2**31 - 1])
def test_only_the_two_neighbours(fmt, key):
    x = normal_numbers(fmt)
    low, high = neighbours(x, fmt)
    result = rounded(x, fmt, key).double()
    assert ((result == low) | (result == high)).all()
    assert (result == low).any()
    assert (result == high).any()


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_unbiased(fmt):
    x = normal_numbers(fmt, 64)
    low, high = neighbours(x, fmt)
    share = (x.double() - low) / (high - low)
    keys = 600
    ups = sum((rounded(x, fmt, key).double() == high).double() for key in range(keys))
    sigma = (share * (1 - share) / keys).sqrt().clamp(min=1 / keys)
    deviation = (ups / keys - share) / sigma
    assert deviation.abs().max() < 4.5  # 64 draws of a normal: probability 4e-4
    assert abs(deviation.mean()) < 4.0 / math.sqrt(64)


@pytest.mark.parametrize("fmt", [*FORMATS, FP32], ids=repr)
def test_numbers_of_the_format_never_move(fmt):
    exact = normal_numbers(fmt).to(fmt.dtype).float()
    for key in range(5):
        assert torch.equal(rounded(exact, fmt, key), exact)


@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16], ids=repr)
@pytest.mark.parametrize("scale", [2.0**-7, 2.0**12])
def test_scale_is_an_exponent_shift(fmt, scale):
    x = normal_numbers(fmt)
    assert torch.equal(rounded(x / scale, fmt, 3, scale), rounded(x, fmt, 3) / scale)


@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16], ids=repr)
@pytest.mark.parametrize("subnormals_only", [False, True])
def test_subnormals_go_to_a_neighbour_and_are_unbiased(fmt, subnormals_only):
    keys, step = 400, fmt.smallest_subnormal
    x = torch.linspace(-0.999, 0.999, 301) * fmt.smallest_normal
    total = torch.zeros_like(x)
    for key in range(keys):
        payload = cast_stochastic(x, ONE, fmt, noise(len(x), key), subnormals_only=subnormals_only)
        values = KERNELS.dequantize(ScaledTensor(payload, ONE, fmt))
        assert ((values - x).abs() < step).all()
        total += values
    # A Bernoulli step has a standard deviation of at most half a step; 5 sigma over all means.
    assert ((total / keys - x).abs() <= 5 * 0.5 * step / keys**0.5).all()


@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16], ids=repr)
def test_subnormals_of_the_format_never_move(fmt):
    # All of them, with the noise nearest to 0 and to 1, and with that of a key.
    largest = round(fmt.smallest_normal / fmt.smallest_subnormal)
    exact = torch.arange(-largest, largest + 1) * fmt.smallest_subnormal
    least, most = torch.zeros(len(exact), dtype=torch.int32), torch.full((len(exact),), -1).int()
    for bits in (least, most, noise(len(exact), 3)):
        payload = cast_stochastic(exact, ONE, fmt, bits)
        assert torch.equal(KERNELS.dequantize(ScaledTensor(payload, ONE, fmt)), exact)


@pytest.mark.parametrize("fmt", [*FORMATS, FP32], ids=repr)
@pytest.mark.parametrize("subnormals_only", [False, True])
def test_zeros_stay_zero(fmt, subnormals_only):
    zeros = torch.tensor([0.0, -0.0] * 50)
    payload = cast_stochastic(zeros, ONE, fmt, noise(100, 3), subnormals_only=subnormals_only)
    assert not KERNELS.dequantize(ScaledTensor(payload, ONE, fmt)).any()


@pytest.mark.parametrize("fmt", [BF16, FP32], ids=repr)
def test_subnormals_of_formats_with_fp32_exponents(fmt):
    x = torch.linspace(-0.999, 0.999, 301) * fmt.smallest_normal
    total = torch.zeros(len(x), dtype=torch.float64)
    for key in range(200):
        values = rounded(x, fmt, key)
        assert ((values - x).abs() < fmt.smallest_subnormal).all()
        total += values.double()
    # A Bernoulli step has a standard deviation of at most half a step; 5 sigma over all means.
    bound = 5 * 0.5 * fmt.smallest_subnormal / 200**0.5
    assert ((total / 200 - x.double()).abs() <= bound).all()
    assert fmt == BF16 or torch.equal(rounded(x, fmt, 1), x)


@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16], ids=repr)
def test_subnormals_only_leaves_normal_numbers_to_the_nearest(fmt):
    x = normal_numbers(fmt)
    payload = cast_stochastic(x, ONE, fmt, noise(len(x), 1), subnormals_only=True)
    assert torch.equal(payload, KERNELS.cast(x, ONE, fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_saturates_and_keeps_nan(fmt):
    x = torch.tensor([fmt.max, -fmt.max, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan])
    just_below = torch.nextafter(torch.tensor(fmt.max), torch.tensor(0.0))
    for key in range(5):
        payload = cast_stochastic(x, ONE, fmt, noise(7, key))
        values = payload.view(fmt.dtype).float()
        assert values[:6].tolist() == [fmt.max, -fmt.max] * 3
        assert values[6].isnan()
        below = rounded(just_below.repeat(100), fmt, key)
        assert (below <= fmt.max).all()


def test_nan_scale_gives_nan():
    payload = cast_stochastic(torch.ones(4), torch.tensor(math.nan), FP16, noise(4, 0))
    assert payload.isnan().all()


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_independent_of_how_the_tensor_is_split(fmt):
    x = normal_numbers(fmt, 1000)
    whole = cast_stochastic(x, ONE, fmt, noise(1000, 5))
    parts = [
        cast_stochastic(x[start:stop], ONE, fmt, noise(stop - start, 5, start))
        for start, stop in ((0, 1), (1, 500), (500, 1000))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_inputs_are_only_read():
    x, index, key = torch.randn(50), indices(50), torch.tensor(9, dtype=torch.int32)
    bits = noise_bits(index, key)
    copies = [t.clone() for t in (x, index, key, bits)]
    cast_stochastic(x, ONE, E4M3, bits)
    noise_bits(index, key)
    for tensor, copy in zip((x, index, key, bits), copies, strict=True):
        assert torch.equal(tensor, copy)


def chi_square(values, buckets):
    """Chi-square of `values` over `buckets`, in standard deviations from its expectation."""
    counts = torch.bincount(values.long(), minlength=buckets).double()
    expected = len(values) / buckets
    statistic = ((counts - expected) ** 2 / expected).sum() - (buckets - 1)
    return abs(statistic.item()) / math.sqrt(2 * (buckets - 1))


# The same bits that rounding to E4M3, FP16 and BF16 uses are among these.
@pytest.mark.parametrize("key", [0, 1, -1, 123456789, -(2**31)])
@pytest.mark.parametrize("start", [0, 2**20, 2**31 - 2**16])
@pytest.mark.parametrize("shift", [0, 5, 12, 24])
def test_noise_is_uniform(key, start, shift):
    bits = noise(2**16, key, start).bitwise_right_shift(shift) & 0xFF
    assert chi_square(bits, 256) < 5


def test_every_bit_is_fair():
    count = 2**16
    bits = noise(count, 42)
    for position in range(32):
        ones = ((bits >> position) & 1).sum().item()
        assert abs(ones - count / 2) < 4.5 * math.sqrt(count) / 2


def test_neighbouring_elements_are_independent():
    bits = noise(2**16, 7) & 0xF
    assert chi_square(bits[:-1] * 16 + bits[1:], 256) < 5


@pytest.mark.parametrize("other", [1, 2, 0x632BE5AB, -1])
def test_noise_of_two_keys_is_independent(other):
    first, second = noise(2**16, 0) & 0xF, noise(2**16, other) & 0xF
    assert chi_square(first * 16 + second, 256) < 5


def test_noise_is_a_function_of_key_and_index():
    assert torch.equal(noise(100, 3), noise(100, 3))
    assert torch.equal(noise(100, 3)[40:], noise(60, 3, start=40))
