"""Casts and decodes against tables computed by hand: every code, tie, limit and special value."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.numerics import BF16, E2M5, E4M3, E5M2, FP16, FP32
from fp8lm.scaled_tensor import ScaledTensor
from tests.numerics.tables import all_codes, code_values, finite_codes, finite_values

KERNELS = ReferenceKernels()
SMALL_BLOCKS = ReferenceKernels(block_elements=7)
FP8 = [E4M3, E5M2, E2M5]
SCALED = [*FP8, FP16]
WITH_NAN = [E4M3, E5M2, FP16]
SCALES = [2.0**-20, 1.0, 2.0**9, 2.0**40]


def cast(x, fmt, scale=1.0, **options):
    return KERNELS.cast(x, torch.tensor(scale), fmt, **options)


def decode(payload, fmt, dtype=torch.float32, scale=1.0):
    return KERNELS.dequantize(ScaledTensor(payload, torch.tensor(scale), fmt), dtype)


def positive_steps(fmt):
    """All numbers of `fmt` from 0 to its maximum, in order."""
    if fmt == FP16:
        return torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    values = finite_values(fmt)
    return values[: len(values) // 2]


def numbers_and_codes(fmt):
    """All finite numbers of `fmt`, both zeros included, and their payload."""
    if fmt == FP16:
        values = torch.cat((positive_steps(fmt), -positive_steps(fmt)))
        return values, values.half()
    return finite_values(fmt), finite_codes(fmt)


@pytest.mark.parametrize("fmt", FP8, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", SCALES)
def test_decode_every_finite_code(fmt, dtype, scale):
    decoded = decode(finite_codes(fmt), fmt, dtype, scale)
    expected = finite_values(fmt) / scale  # exact in bf16 too: powers of two, three bits
    assert decoded.dtype == dtype
    assert torch.equal(decoded.float(), expected)
    assert torch.equal(decoded.signbit(), expected.signbit())  # of zeros too


@pytest.mark.parametrize("fmt", FP8, ids=repr)
def test_decode_subnormals_that_bf16_has_not(fmt):
    expected = finite_values(fmt).double() * 2.0**-126
    assert torch.equal(decode(finite_codes(fmt), fmt, torch.float32, 2.0**126).double(), expected)


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_with_a_nan_scale_is_nan_for_every_code(fmt, dtype):
    payload = all_codes() if fmt != FP16 else torch.randn(64).half()
    assert decode(payload, fmt, dtype, math.nan).isnan().all()


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=repr)
def test_decode_agrees_with_torch_on_every_finite_code(fmt):
    codes = finite_codes(fmt)
    assert torch.equal(decode(codes, fmt), codes.view(fmt.dtype).float())


VIEWS = {
    "transposed": lambda t: t.view(12, 16).t(),
    "columns": lambda t: t.view(12, 16)[:, 2:7],
    "every other row": lambda t: t.view(12, 16)[::2],
    "transposed columns": lambda t: t.view(12, 16)[:, 2:7].t(),
    "permuted": lambda t: t.view(4, 6, 8).permute(2, 0, 1),
    "strided vector": lambda t: t[::3],
    "expanded": lambda t: t[:8].expand(5, 8),
    "one element": lambda t: t[70],
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(fmt, view):
    view = VIEWS[view]
    x = torch.randn(192, generator=torch.Generator().manual_seed(3))
    payload = cast(x, fmt)
    assert torch.equal(cast(view(x), fmt), view(payload))
    assert torch.equal(decode(view(payload), fmt), view(decode(payload, fmt)))


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [6, 7, 8, 14, 100])
def test_blocks_do_not_show(fmt, dtype, count):
    x = torch.randn(count, generator=torch.Generator().manual_seed(4)).to(dtype)
    scale = torch.tensor(2.0**5)
    payload = KERNELS.cast(x, scale, fmt)
    assert torch.equal(SMALL_BLOCKS.cast(x, scale, fmt), payload)
    values = KERNELS.dequantize(ScaledTensor(payload, scale, fmt), dtype)
    assert torch.equal(SMALL_BLOCKS.dequantize(ScaledTensor(payload, scale, fmt), dtype), values)


@pytest.mark.parametrize("fmt", [BF16, FP32], ids=repr)
def test_formats_without_a_scale_only_change_dtype(fmt):
    x = torch.randn(50)
    payload = cast(x, fmt, scale=1.0)
    assert torch.equal(payload, x.to(fmt.dtype))
    assert torch.equal(decode(payload, fmt), x.to(fmt.dtype).float())


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("saturate", [True, False])
def test_every_number_of_the_format_survives_a_round_trip(fmt, dtype, scale, saturate):
    values, payload = numbers_and_codes(fmt)
    exact = (values / scale).to(dtype).double() * scale == values  # bf16 lacks bits of FP16
    x = (values / scale).to(dtype)[exact]
    expected = payload[exact].view(torch.int8 if fmt.bytes == 1 else torch.int16)
    assert torch.equal(cast(x, fmt, scale, saturate=saturate).view(expected.dtype), expected)


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ties_go_to_even_and_all_else_to_the_nearest(fmt, sign):
    steps = positive_steps(fmt)
    low, high = steps[:-1], steps[1:]
    middle = (low + high) / 2  # exact in fp32, subnormals included
    even = torch.where(torch.arange(len(low)) % 2 == 0, low, high)
    below = torch.nextafter(middle, torch.tensor(0.0))
    above = torch.nextafter(middle, torch.tensor(math.inf))
    for x, expected in ((middle, even), (below, low), (above, high)):
        assert torch.equal(decode(cast(sign * x, fmt), fmt), sign * expected)


@pytest.mark.parametrize("fmt", FP8, ids=repr)
def test_ties_of_bf16_input(fmt):
    steps = positive_steps(fmt)
    middle = ((steps[:-1] + steps[1:]) / 2).bfloat16()
    even = torch.where(torch.arange(len(middle)) % 2 == 0, steps[:-1], steps[1:])
    assert torch.equal(decode(cast(middle, fmt), fmt), even)


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
def test_what_is_too_small_becomes_zero(fmt):
    tie = fmt.smallest_subnormal / 2
    x = torch.tensor([tie, -tie, tie * 0.99, 1e-45, 0.0, -0.0])
    assert decode(cast(x, fmt), fmt).tolist() == [0.0] * 6
    smallest = decode(cast(torch.tensor([tie * 1.01]), fmt), fmt)
    assert smallest == fmt.smallest_subnormal


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overflow_and_infinity_saturate(fmt, dtype):
    factors = torch.tensor([1.01, 1.06, 1.2, 2.0, 1e10, math.inf])
    x = torch.cat((fmt.max * factors, -fmt.max * factors)).to(dtype)
    expected = [fmt.max] * 6 + [-fmt.max] * 6
    assert decode(cast(x, fmt), fmt).tolist() == expected


@pytest.mark.parametrize("fmt", WITH_NAN, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saturate", [True, False])
def test_nan_stays_nan(fmt, dtype, saturate):
    payload = cast(torch.tensor([math.nan, -math.nan, 1.0], dtype=dtype), fmt, saturate=saturate)
    values = payload.tolist() if fmt == FP16 else [code_values(fmt)[i] for i in payload.tolist()]
    assert [math.isnan(value) for value in values] == [True, True, False]


@pytest.mark.parametrize("fmt", WITH_NAN, ids=repr)
def test_nan_scale_makes_every_code_nan(fmt):
    payload = cast(torch.tensor([0.0, 1.0, math.inf]), fmt, math.nan, saturate=False)
    values = payload.tolist() if fmt == FP16 else [code_values(fmt)[i] for i in payload.tolist()]
    assert all(math.isnan(value) for value in values)


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("scale", SCALES)
def test_bf16_and_fp32_inputs_give_the_same_bytes(fmt, scale):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3000, generator=generator) * 2.0 ** torch.randint(
        -30, 30, (3000,), generator=generator
    )
    x = (x / scale).bfloat16()
    assert torch.equal(cast(x, fmt, scale), cast(x.float(), fmt, scale))


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
def test_scale_is_an_exponent_shift(fmt):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    payload = cast(x, fmt, 8.0)
    assert torch.equal(payload, cast(x * 8.0, fmt))
    assert torch.equal(decode(payload, fmt, scale=8.0), decode(payload, fmt) / 8.0)


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
def test_input_is_only_read(fmt):
    x = torch.randn(100) * 1e6
    copy = x.clone()
    cast(x, fmt)
    payload = cast(x, fmt)
    payload_copy = payload.clone()
    decode(payload, fmt)
    assert torch.equal(x, copy)
    assert torch.equal(payload, payload_copy)


@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16, BF16, FP32], ids=repr)
def test_payload_has_the_storage_dtype_and_the_shape(fmt):
    payload = cast(torch.randn(3, 5), fmt)
    assert (payload.dtype, payload.shape) == (fmt.storage, (3, 5))
