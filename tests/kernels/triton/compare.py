"""Equality with the reference, bit for bit; and inputs to compare on."""

from __future__ import annotations

import math

import torch

from fp8lm.numerics import E2M5, E4M3, E5M2

GENERATOR_SEED = 7


def all_bf16_codes():
    """Every number of bf16, those that are not finite included: 65,536."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def finite_bf16_codes():
    codes = all_bf16_codes()
    return codes[codes.isfinite()]


def normal(*shape, dtype=torch.bfloat16, scale=1.0):
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def with_value(value, dtype=torch.bfloat16):
    x = normal(5, 40, dtype=dtype)
    x[3, 7] = value
    return x


def wide(*shape, dtype=torch.bfloat16):
    """Normal numbers of 80 binades."""
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    exponents = torch.randint(-40, 40, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * 2.0**exponents).to(dtype)


INPUTS = {
    "normal": lambda: normal(33, 70),
    "normal fp32": lambda: normal(33, 70, dtype=torch.float32),
    "wide": lambda: wide(40, 130),
    "wide fp32": lambda: wide(40, 130, dtype=torch.float32),
    "one": lambda: normal(1, 1),
    "zeros": lambda: torch.zeros(3, 16, dtype=torch.bfloat16),
    "negative zeros": lambda: -torch.zeros(3, 16),
    "subnormals": lambda: normal(9, 16, dtype=torch.float32, scale=1e-40),
    "large": lambda: normal(9, 16, dtype=torch.float32, scale=1e38),
    "nan": lambda: with_value(math.nan),
    "inf": lambda: with_value(-math.inf, torch.float32),
    "all bf16": lambda: all_bf16_codes().view(64, 1024),
    "finite bf16": lambda: finite_bf16_codes().view(-1, 1020),
}


def assert_same(actual, expected):
    """Same format, scales and payload; any two NaN codes are the same."""
    assert (actual.format, actual.granularity) == (expected.format, expected.granularity)
    assert actual.payload.is_contiguous() == expected.payload.is_contiguous()
    assert_same_values(actual.scale, expected.scale)
    if actual.inverse is not None:
        assert_same_values(actual.inverse, expected.scale.reciprocal())
    assert_same_values(*(_codes(x) for x in (actual, expected)))


def assert_same_values(actual, expected):
    """Bits of two tensors, whose NaN may differ."""
    actual = actual.cpu()
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    same = _bits(actual) == _bits(expected)
    if expected.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ"


def _codes(x):
    payload = x.payload.cpu()
    if x.format in (E4M3, E5M2):
        return payload.view(x.format.dtype).float()  # exact, and knows the NaN
    if x.format == E2M5 and bool(x.scale.isnan().any()):
        nan = x.granularity.expand(x.scale.cpu(), payload.shape).isnan()
        return payload.masked_fill(nan, 0)  # the sign of NaN
    return payload


def _bits(x):
    return x.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    )
