"""Sums of gradients in place: the reference's bytes, after one and after several terms."""

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.triton.backend import TritonKernels
from fp8lm.numerics import BF16, E2M5, E4M3, E5M2, FP32, granularity_of
from fp8lm.scaled_tensor import ScaledTensor
from tests.kernels.triton.compare import INPUTS, assert_same, normal, wide
from tests.kernels.triton.traffic import counting

KERNELS, REFERENCE = TritonKernels(), ReferenceKernels()
FORMATS = [E4M3, E5M2, E2M5, BF16, FP32]


def zeros(shape, fmt, device="cpu"):
    """A sum of no terms, as a weight's main gradient holds it."""
    total = ScaledTensor.zeros(shape, fmt, torch.device(device), granularity_of(fmt, shape))
    return total.elements(0, math.prod(shape))


def accumulated(terms, fmt, device):
    actual, expected = zeros(terms[0].shape, fmt, device), zeros(terms[0].shape, fmt)
    for term in terms:
        KERNELS.accumulate_(actual, term.reshape(actual.shape).to(device))
        REFERENCE.accumulate_(expected, term.reshape(expected.shape))
    return actual, expected


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("name", [name for name in INPUTS if "all bf16" not in name])
def test_two_terms(fmt, name, device):
    if name == "subnormals" and fmt in (E4M3, E5M2):
        pytest.skip("the reference decodes by way of bf16, which ends at 2^-133")
    x = INPUTS[name]()
    assert_same(*accumulated([x, 0.3 * x.flip(0)], fmt, device))


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 24), (100, 128), (65, 129)])
def test_many_terms_of_every_size(fmt, dtype, shape, device):
    terms = [wide(*shape, dtype=dtype) * 2.0**-i for i in range(3)]
    assert_same(*accumulated([*terms, normal(*shape, dtype=dtype)], fmt, device))


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("event", [math.nan, math.inf, -math.inf])
def test_an_event_is_never_forgotten(fmt, event, device):
    x = normal(20, 128)
    x[13, 100] = event
    actual, expected = accumulated([normal(20, 128), x, normal(20, 128)], fmt, device)
    assert_same(actual, expected)
    assert not KERNELS.dequantize(actual).isfinite().all()


def test_sums_that_vanish(device):
    x = normal(4, 128)
    for fmt in FORMATS:
        actual, expected = accumulated([x, -KERNELS.dequantize(zeros_plus(x, fmt))], fmt, device)
        assert_same(actual, expected)
        assert not KERNELS.dequantize(actual).any()


def zeros_plus(x, fmt):
    total = zeros(x.shape, fmt)
    REFERENCE.accumulate_(total, x.reshape(total.shape))
    return total


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_declared_traffic():
    x = normal(100, 128)
    with counting() as traffic:
        KERNELS.accumulate_(zeros(x.shape, E4M3), x.view(-1))
        KERNELS.accumulate_(zeros(x.shape, E2M5), x)
    assert traffic.measured == traffic.declared
    numel, parts = x.numel(), 4
    assert traffic.declared == [
        ("amax_of_sum", 3 * numel + 4, 4 * parts + 4),
        ("cast_of_sum", 3 * numel + 4 * parts + 4, numel + 4),
        ("accumulate_rows", 3 * numel + 4 * 100, numel + 4 * 100),
    ]
