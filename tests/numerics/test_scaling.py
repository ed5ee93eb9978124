"""`scale_from_amax` is exactly 2^floor(log2(max / amax)), and says so when there is no scale."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from fp8lm.numerics import BF16, E4M3, E5M2, FP16, FP32, ROOT_E4M4, scale_from_amax

SCALED = [E4M3, E5M2, FP16]


def oracle(amax: float, fmt) -> float:
    """The scale in exact rational arithmetic."""
    ratio = Fraction(fmt.max) / Fraction(amax)
    exponent = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    if Fraction(2) ** exponent > ratio:
        exponent -= 1
    return 2.0 ** max(-126, min(126, exponent))


def random_amaxes(count: int) -> torch.Tensor:
    """Positive finite fp32 of all magnitudes: uniform over bit patterns."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(1, 0x7F800000, (count,), dtype=torch.int32, generator=generator)
    return bits.view(torch.float32)


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
def test_thousands_of_amaxes(fmt):
    amax = random_amaxes(4000)
    expected = torch.tensor([oracle(value, fmt) for value in amax.tolist()])
    assert torch.equal(scale_from_amax(amax, fmt), expected)


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("exponent", [-100, -20, -1, 0, 1, 30])
def test_boundaries(fmt, exponent):
    # The scale halves just above max * 2^n, never at it: there amax * scale is exactly max.
    edge = torch.tensor(fmt.max * 2.0**exponent)
    up = torch.nextafter(edge, torch.tensor(math.inf))
    down = torch.nextafter(edge, torch.tensor(0.0))
    scale = scale_from_amax(torch.stack((down, edge, up)), fmt)
    assert scale.tolist() == [2.0**-exponent, 2.0**-exponent, 2.0 ** (-exponent - 1)]
    assert edge * scale[1] == fmt.max


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
def test_scaled_amax_fills_the_upper_binade(fmt):
    amax = random_amaxes(4000)
    amax = amax[amax > fmt.max * 2.0**-126]  # below, the exponent is clamped
    scaled = amax.double() * scale_from_amax(amax, fmt).double()
    assert (scaled <= fmt.max).all()
    assert (scaled > fmt.max / 2).all()


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_has_scale_one(fmt, zero):
    assert scale_from_amax(torch.tensor(zero), fmt) == 1.0


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_has_the_largest_scale_where_the_smallest_code_stands_for_it(zero):
    assert scale_from_amax(torch.tensor(zero), ROOT_E4M4) == 2.0**126


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("amax", [2.0**-149, 2.0**-140, 2.0**-126, torch.finfo(torch.float32).max])
def test_extremes_stay_finite_with_a_normal_reciprocal(fmt, amax):
    scale = scale_from_amax(torch.tensor(amax), fmt)
    assert scale == oracle(amax, fmt)
    assert 2.0**-126 <= scale <= 2.0**126
    assert torch.tensor(amax) * scale <= fmt.max


# x86 gives the NaN of Inf * 0 a negative sign.
NOT_FINITE = [math.inf, math.nan, torch.tensor(0xFFC00000 - 2**32, dtype=torch.int32)]


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("amax", NOT_FINITE, ids=["inf", "nan", "negative nan"])
def test_not_finite_is_nan(fmt, amax):
    amax = amax.view(torch.float32) if isinstance(amax, torch.Tensor) else torch.tensor(amax)
    assert scale_from_amax(amax, fmt).isnan()


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3)])
def test_any_shape(shape):
    amax = random_amaxes(math.prod(shape)).view(shape)
    scale = scale_from_amax(amax, E4M3)
    assert (scale.shape, scale.dtype) == (amax.shape, torch.float32)
    one_by_one = [scale_from_amax(value, E4M3).item() for value in amax.flatten()]
    assert scale.flatten().tolist() == one_by_one


def test_special_values_do_not_touch_their_neighbours():
    amax = torch.tensor([1.0, 0.0, math.nan, 1.0, math.inf, 1.0])
    scale = scale_from_amax(amax, E4M3)
    assert scale[[0, 1, 3, 5]].tolist() == [256.0, 1.0, 256.0, 256.0]
    assert scale[[2, 4]].isnan().all()
    assert amax[0] == 1.0  # the input is only read


@pytest.mark.parametrize("fmt", [BF16, FP32], ids=repr)
def test_formats_without_a_scale(fmt):
    amax = torch.tensor([0.0, 1.0, 1e30, math.inf])
    assert torch.equal(scale_from_amax(amax, fmt), torch.ones(4))
