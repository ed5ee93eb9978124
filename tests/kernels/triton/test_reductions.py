"""Sums of squares, amaxes, sums of several tensors."""

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.triton.backend import TritonKernels
from fp8lm.kernels.triton.reductions import CHUNK
from fp8lm.numerics import BF16, E2M5, E4M3, E5M2, FP16, FP32, ROOT_E4M4, granularity_of
from fp8lm.scaled_tensor import ScaledTensor
from tests.kernels.triton.compare import assert_same, assert_same_values, normal, wide, with_value
from tests.kernels.triton.traffic import counting

KERNELS, REFERENCE = TritonKernels(), ReferenceKernels()


def stored(x, fmt, device):
    """`x` in `fmt`, on the CPU and on the device."""
    here = REFERENCE.quantize(x, fmt, granularity=granularity_of(fmt, tuple(x.shape)))
    payload, scale = here.payload.to(device), here.scale.to(device)
    return here, ScaledTensor(payload, scale, fmt, here.granularity)


def assert_same_norms(here, there):
    """The amaxes; and the sums of squares but for their order."""
    expected, amaxes = REFERENCE.square_sums_and_amaxes(here)
    squares, actual_amaxes = KERNELS.square_sums_and_amaxes(there)
    assert_same_values(actual_amaxes, amaxes)
    assert squares.dtype == torch.float64
    for square, exact, tensor in zip(squares.cpu(), expected, here, strict=True):
        bound = tensor.payload.numel() * 2.0**-52  # n 2^-53 each, of n terms of one sign
        torch.testing.assert_close(square, exact, rtol=bound, atol=0)


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M5, FP16, BF16, FP32], ids=repr)
@pytest.mark.parametrize("shape", [(1, 1), (3, 24), (65, 130), (300, 128)])
def test_square_sum_and_amax(fmt, shape, device):
    here, there = stored(normal(*shape, dtype=torch.float32), fmt, device)
    assert_same_norms([here], [there])


def test_norms_of_all_formats_at_once(device):
    """Two and a half chunks of each, a part of one, and tensors without an element."""
    formats = [E4M3, E5M2, E2M5, FP16, BF16, FP32]
    shapes = [(5 * CHUNK // 256, 128), (9, 16), (3, 5)]
    pairs = [
        stored(normal(*shape, dtype=torch.float32) * (1 + place), fmt, device)
        for shape in shapes
        for place, fmt in enumerate(formats)
    ]
    pairs += [(x.rows(0, 0), y.rows(0, 0)) for x, y in pairs if x.granularity.is_per_tensor]
    assert_same_norms(*zip(*pairs, strict=True))


def test_norms_of_parts_that_start_anywhere(device):
    here, there = stored(normal(40, 24), E4M3, device)
    parts = [(0, 3), (3, 20), (20, 21)]
    assert_same_norms([here.rows(*p) for p in parts], [there.rows(*p) for p in parts])


def test_norms_are_reproducible(device):
    tensors = [stored(normal(5 * CHUNK // 256, 128), fmt, device)[1] for fmt in (E4M3, FP32)]
    first, again = (KERNELS.square_sums_and_amaxes(tensors) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_norm_wants_contiguous_payloads(device):
    with pytest.raises(ValueError, match="contiguous"):
        KERNELS.square_sums_and_amaxes([stored(normal(8, 16), E4M3, device)[1].t()])


@pytest.mark.parametrize("event", [math.nan, math.inf])
@pytest.mark.parametrize("fmt", [E4M3, E2M5, BF16], ids=repr)
def test_events_in_a_square_sum(event, fmt, device):
    _, there = stored(with_value(event), fmt, device)
    _, finite = stored(normal(5, 40), fmt, device)
    squares, amaxes = KERNELS.square_sums_and_amaxes([finite, there])
    assert squares.isfinite().tolist() == amaxes.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16, BF16, FP32], ids=repr)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sum_in_order(dtype, fmt, count, device):
    pairs = [stored(wide(9, 70) * 3.0**i, fmt, device) for i in range(count)]
    expected = REFERENCE.sum_in_order([here for here, _ in pairs], dtype)
    assert_same_values(KERNELS.sum_in_order([there for _, there in pairs], dtype), expected)


def test_sum_of_unlike_terms(device):
    (here, there), plain = stored(normal(9, 70), E4M3, device), normal(9, 70)
    expected = REFERENCE.sum_in_order([here, plain], torch.float32)
    assert_same_values(KERNELS.sum_in_order([there, plain.to(device)], torch.float32), expected)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=repr)
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_add_in_format_saturates(fmt, factor, device):
    x, scale = normal(9, 70) * factor, torch.tensor(fmt.max / 8)
    here = ScaledTensor(REFERENCE.cast(x, scale, fmt), scale, fmt)
    there = ScaledTensor(here.payload.to(device), scale.to(device), fmt)
    assert_same(KERNELS.add_in_format(there, there), REFERENCE.add_in_format(here, here))


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M5], ids=repr)
def test_saturated_share(fmt, device):
    x = normal(9, 70)
    here = REFERENCE.quantize(x, fmt, amax=torch.tensor(0.5))
    there = ScaledTensor(here.payload.to(device), here.scale.to(device), fmt)
    assert_same_values(KERNELS.saturated_share(there), REFERENCE.saturated_share(here))


def test_a_format_of_the_optimizer_alone(device):
    here, there = stored(normal(9, 70).abs(), ROOT_E4M4, device)
    assert_same(KERNELS.quantize(normal(9, 70).abs().to(device), ROOT_E4M4), here)
    assert_same_values(KERNELS.dequantize(there), REFERENCE.dequantize(here))
    assert_same_norms([here], [there])


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_declared_traffic():
    x, y = (stored(normal(65, 128), fmt, "cpu")[1] for fmt in (E4M3, E2M5))
    with counting() as traffic:
        KERNELS.square_sums_and_amaxes([x, y, x.clone()])
        KERNELS.add_in_format(x, x.clone())
    assert traffic.measured == traffic.declared
    numel = x.payload.numel()  # a chunk
    assert traffic.declared == [
        ("square_sums", 2 * (numel + 4 + 8 * 4 + 4), 2 * 12),
        ("square_sums", numel + 4 * 65 + 8 * 4 + 4, 12),
        ("add_parts", 3 * (8 * 2 + 12), 3 * 12),
        ("add_with_scale", 2 * numel + 8, numel),
    ]
