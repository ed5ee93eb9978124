"""Casts and decodes in Triton give the reference's bytes."""

from contextlib import contextmanager

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.cost import recording
from fp8lm.kernels.triton.backend import TritonKernels
from fp8lm.numerics import E2M5, E4M3, E5M2, FP16, PER_ROW, Granularity
from fp8lm.scaled_tensor import ScaledTensor
from tests.kernels.triton.compare import INPUTS, assert_same, assert_same_values, normal, wide
from tests.kernels.triton.traffic import counting
from tests.numerics.tables import all_codes, finite_codes

KERNELS, REFERENCE = TritonKernels(), ReferenceKernels()
FP8 = [E4M3, E5M2]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")


@contextmanager
def counting_launches():
    """The names of the kernels that are launched."""
    names = []

    class Names:
        def record(self, name, reads, writes):
            names.append(name)

    with recording(Names()):
        yield names


@pytest.mark.parametrize("fmt", [*FP8, E2M5, FP16], ids=repr)
@pytest.mark.parametrize("name", INPUTS)
def test_quantize(fmt, name, device):
    x = INPUTS[name]()
    assert_same(KERNELS.quantize(x.to(device), fmt), REFERENCE.quantize(x, fmt))


@pytest.mark.parametrize("fmt", FP8, ids=repr)
@pytest.mark.parametrize("name", INPUTS)
def test_both_orientations(fmt, name, device):
    x = INPUTS[name]()
    quantized, transposed = KERNELS.quantize_with_transpose(x.to(device), fmt)
    expected = REFERENCE.quantize(x, fmt)
    assert_same(quantized, expected)
    expected.payload = expected.payload.t().contiguous()
    assert_same(transposed, expected)


@pytest.mark.parametrize("shape", [(128, 128), (129, 300), (1, 131), (257, 2)])
def test_tiles_at_the_edge(shape, device):
    x = normal(*shape)
    expected = REFERENCE.quantize(x, E4M3)
    quantized, transposed = KERNELS.quantize_with_transpose(x.to(device), E4M3)
    assert torch.equal(quantized.payload.cpu(), expected.payload)
    assert torch.equal(transposed.payload.cpu(), expected.payload.t())
    transposed = KERNELS.transpose(KERNELS.quantize(x.to(device), E4M3))
    assert torch.equal(transposed.payload.cpu(), expected.payload.t())
    assert transposed.payload.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (129, 300), (1, 131), (257, 2)])
def test_column_sums_of_what_is_cast(shape, dtype, device):
    """fp32 sums of R terms, in the same order every time, and one rounding."""
    x = normal(*shape, dtype=dtype)
    found = []
    for _ in range(2):
        there = x.to(device)
        quantized, _ = KERNELS.quantize_with_transpose(there, E5M2, sums=True)
        assert_same(quantized, REFERENCE.quantize(x, E5M2))
        with counting_launches() as launched:
            found.append(KERNELS.column_sums(there).cpu())
        assert launched == ["add_rows"]
    exact, magnitude = x.double().sum(0), x.double().abs().sum(0)
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + magnitude * shape[0] * 2.0**-24
    assert ((found[0].double() - exact).abs() <= bound).all()
    assert found[0].dtype == dtype and torch.equal(*found)


def test_column_sums_of_what_was_not_cast(device):
    x = normal(20, 30).to(device)
    KERNELS.quantize_with_transpose(x + 1.0, E5M2, sums=True)
    KERNELS.quantize_with_transpose(x, E5M2)
    assert torch.equal(KERNELS.column_sums(x), x.sum(0))


@pytest.mark.parametrize("event", [torch.nan, torch.inf])
def test_events_in_a_column(event, device):
    x = normal(140, 30)
    x[133, 7] = event
    there = x.to(device)
    KERNELS.quantize_with_transpose(there, E5M2, sums=True)
    finite = KERNELS.column_sums(there).isfinite().cpu()
    assert torch.equal(~finite, torch.arange(30) == 7)


@pytest.mark.parametrize("fmt", [*FP8, E2M5, FP16], ids=repr)
@pytest.mark.parametrize("amax", [0.0, 1e-3, 2.0, 448.0, 3e38, torch.inf, torch.nan, -torch.nan])
def test_a_given_amax(fmt, amax, device):
    x, amax = wide(40, 130), torch.tensor(amax)
    expected = REFERENCE.quantize(x, fmt, amax=amax)
    assert_same(KERNELS.quantize(x.to(device), fmt, amax=amax.to(device)), expected)


@pytest.mark.parametrize("fmt", FP8, ids=repr)
def test_nothing(fmt, device):
    amax, x = torch.tensor(3.0), torch.empty(0, 16)
    expected = REFERENCE.quantize(x, fmt, amax=amax)
    assert_same(KERNELS.quantize(x.to(device), fmt, amax=amax.to(device)), expected)


@pytest.mark.parametrize("view", ["transposed", "columns", "3-d"])
def test_any_strides(view, device):
    x = normal(48, 60)
    x = {"transposed": x.t(), "columns": x[:, 5:50], "3-d": x.view(4, 12, 60)[:, ::2]}[view]
    expected = REFERENCE.quantize(x.contiguous(), E4M3)
    assert_same(KERNELS.quantize(x.to(device), E4M3), expected)


@pytest.mark.parametrize("fmt", [*FP8, E2M5], ids=repr)
@pytest.mark.parametrize("granularity", [PER_ROW, Granularity(1, 10), Granularity(1, 16)], ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_scales_of_rows_and_blocks(fmt, granularity, name, device):
    x = INPUTS[name]()
    expected = REFERENCE.quantize(x, fmt, granularity=granularity)
    actual = KERNELS.quantize(x.to(device), fmt, granularity=granularity)
    assert_same(actual, expected)
    assert_same_values(KERNELS.dequantize(actual), REFERENCE.dequantize(expected))


def test_given_amaxes_of_rows(device):
    x = wide(40, 130)
    amax = 2.0 * x.float().abs().amax(dim=1, keepdim=True)
    expected = REFERENCE.quantize(x, E4M3, amax=amax, granularity=PER_ROW)
    actual = KERNELS.quantize(x.to(device), E4M3, amax=amax.to(device), granularity=PER_ROW)
    assert_same(actual, expected)


@pytest.mark.parametrize("fmt", [*FP8, FP16], ids=repr)
@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**9, torch.nan])
def test_cast_with_a_scale(fmt, scale, device):
    x, scale = wide(40, 130), torch.tensor(scale)
    expected = ScaledTensor(REFERENCE.cast(x, scale, fmt), scale, fmt)
    payload = KERNELS.cast(x.to(device), scale.to(device), fmt)
    assert_same(ScaledTensor(payload, scale.to(device), fmt), expected)


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M5], ids=repr)
@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**40, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_every_code(fmt, scale, dtype, device):
    codes = all_codes() if scale != scale else finite_codes(fmt)
    stored = ScaledTensor(codes.view(1, -1), torch.full((1, 1), scale), fmt, PER_ROW)
    on_device = ScaledTensor(stored.payload.to(device), stored.scale.to(device), fmt, PER_ROW)
    assert_same_values(KERNELS.dequantize(on_device, dtype), REFERENCE.dequantize(stored, dtype))
    if fmt != E2M5:
        stored, on_device = (
            ScaledTensor(x.payload, x.scale.view(()), fmt) for x in (stored, on_device)
        )
        expected = REFERENCE.dequantize(stored, dtype)
        assert_same_values(KERNELS.dequantize(on_device, dtype), expected)


def test_decode_fp16(device):
    stored = REFERENCE.quantize(wide(40, 130), FP16)
    on_device = ScaledTensor(stored.payload.to(device), stored.scale.to(device), FP16)
    for dtype in (torch.float32, torch.bfloat16):
        expected = REFERENCE.dequantize(stored, dtype)
        assert_same_values(KERNELS.dequantize(on_device, dtype), expected)
        assert_same_values(KERNELS.dequantize(on_device.t(), dtype), expected.t())


@interpreted
def test_declared_traffic():
    x = normal(130, 260)
    with counting() as traffic:
        quantized, _ = KERNELS.quantize_with_transpose(x, E4M3)
        KERNELS.quantize(x, E5M2)
        KERNELS.quantize(x, E4M3, granularity=PER_ROW)
        KERNELS.dequantize(quantized, torch.bfloat16)
        KERNELS.cast(x, quantized.scale, E4M3)
        KERNELS.transpose(quantized)
        KERNELS.quantize_with_transpose(x, E4M3, amax=torch.tensor(1.0), sums=True)
        KERNELS.column_sums(x)
    assert traffic.measured == traffic.declared
    numel, parts, sums = 130 * 260, 5, 2 * 4 * 260
    assert traffic.declared == [
        ("partial_amax", 2 * numel, 4 * parts),
        ("cast_with_transpose", 2 * numel + 4 * parts, 2 * numel + 8),
        ("partial_amax", 2 * numel, 4 * parts),
        ("cast_from_amax", 2 * numel + 4 * parts, numel + 8),
        ("cast_rows", 2 * numel, numel + 4 * 130),
        ("decode_with_scale", numel + 4, 2 * numel),
        ("cast_with_scale", 2 * numel + 4, numel),
        ("transpose_tile", numel, numel),
        ("cast_with_transpose", 2 * numel + 4, 2 * numel + 8 + sums),
        ("add_rows", sums, 2 * 260),
    ]
