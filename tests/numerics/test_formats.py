"""The properties of a format follow from its codes."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.numerics import BF16, E2M5, E4M3, E5M2, FP16, FP32, format_by_name
from tests.numerics.tables import code_values

FP8 = [E4M3, E5M2, E2M5]


@pytest.mark.parametrize("fmt", FP8, ids=repr)
def test_limits_of_fp8_formats(fmt):
    positive = [v for v in code_values(fmt)[:128] if math.isfinite(v) and v > 0]
    assert max(positive) == fmt.max
    assert min(positive) == fmt.smallest_subnormal
    assert fmt.smallest_normal == fmt.smallest_subnormal * 2**fmt.mantissa_bits
    assert fmt.smallest_normal * (1 + 2.0**-fmt.mantissa_bits) in positive


@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16, BF16, FP32], ids=repr)
def test_limits_agree_with_torch(fmt):
    info = torch.finfo(fmt.dtype)
    assert (info.max, info.smallest_normal) == (fmt.max, fmt.smallest_normal)
    assert info.eps == 2.0**-fmt.mantissa_bits
    assert fmt.smallest_subnormal == fmt.smallest_normal * info.eps
    assert fmt.bytes == info.bits // 8 == fmt.storage.itemsize


@pytest.mark.parametrize("fmt", FP8, ids=repr)
def test_fp8_is_stored_as_bytes(fmt):
    assert fmt.storage == torch.uint8
    assert fmt.bytes == 1


@pytest.mark.parametrize("fmt", [*FP8, FP16, BF16, FP32], ids=repr)
def test_format_by_name(fmt):
    assert format_by_name(fmt.name) is fmt


def test_unknown_name():
    with pytest.raises(KeyError):
        format_by_name("fp8_e3m4")
