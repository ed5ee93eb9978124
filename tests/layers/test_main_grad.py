"""Sums over micro-batches: exact where they can be, bounded elsewhere, nothing bad forgotten."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.main_grad import MainGrad
from fp8lm.numerics import BF16, E2M5, E4M3, FP32, granularity_of

KERNELS = ReferenceKernels()
CPU = torch.device("cpu")
FORMATS = [E4M3, E2M5, BF16, FP32]
DTYPES = [torch.bfloat16, torch.float32]
SHAPE = (12, 20)


def accumulator(fmt, shape=SHAPE):
    return MainGrad(shape, fmt, KERNELS, CPU)


def gradients(count, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    amplitudes = 10.0 ** (torch.rand(count, generator=generator) * 4 - 5)
    return [(torch.randn(SHAPE, generator=generator) * a).to(dtype) for a in amplitudes]


def value(g):
    return KERNELS.dequantize(g.value)


def quantize(dw, fmt):
    return KERNELS.quantize(dw, fmt, granularity=granularity_of(fmt, dw.shape))


def summed(fmt, terms):
    g = accumulator(fmt)
    for dw in terms:
        g.add(dw)
    return g


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_micro_batch_is_stored_as_it_is(fmt, dtype):
    (dw,) = gradients(1, dtype)
    g, expected = summed(fmt, [dw]), quantize(dw, fmt)
    assert torch.equal(g.value.payload, expected.payload)
    assert torch.equal(g.value.scale, expected.scale)


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_micro_batch_is_rounded_once(fmt, dtype):
    terms = gradients(5, dtype)
    expected = terms[0].float()
    for dw in terms[1:]:
        stored = KERNELS.dequantize(quantize(expected, fmt))
        expected = stored + dw.float()
    assert torch.equal(value(summed(fmt, terms)), KERNELS.dequantize(quantize(expected, fmt)))


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("count", [2, 8])
def test_sum_in_float64(fmt, count):
    g, exact, bound = accumulator(fmt), 0.0, 0.0
    for dw in gradients(count):
        g.add(dw)
        exact = exact + dw.double()
        # Half a unit of the stored sum, which itself is off by the bound so far; or half a
        # subnormal. FP32's sum rounds before it is stored, hence 2^-24 in any case.
        half_unit = 2.0 ** -(fmt.mantissa_bits + 1) + 2.0**-24
        scale = g.value.granularity.expand(g.value.scale, SHAPE).double()
        subnormal = fmt.smallest_subnormal / 2 / scale
        bound = bound + half_unit * (exact.abs() + bound) + subnormal
    assert ((value(g).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("event", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_bad_value_in_any_micro_batch_is_never_forgotten(fmt, event, when):
    terms = gradients(4)
    terms[when][3, 7] = event
    result = value(summed(fmt, terms))
    assert not result[3, 7].isfinite()
    # What shares its scale: all, a block of 4 (of 20 columns), or nothing.
    lost = {E4M3: result.numel(), E2M5: 4}.get(fmt, 1)
    assert result.isfinite().sum() == result.numel() - lost


def test_opposite_infinities_do_not_cancel():
    for fmt in FORMATS:
        g = accumulator(fmt)
        for event in (math.inf, -math.inf):
            g.add(torch.full(SHAPE, event))
        assert value(g).isnan().all()


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_zero_leaves_the_memory_alone_until_the_next_gradient(fmt):
    first, second = gradients(2)
    g = summed(fmt, [first])
    payload, before = g.value.payload, g.value.clone()
    g.zero()
    assert torch.equal(g.value.payload, before.payload)
    assert torch.equal(g.value.scale, before.scale)
    g.add(second)
    assert torch.equal(value(g), value(summed(fmt, [second])))
    assert g.value.payload is payload


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("how", ["add", "settle"])
def test_stale_content_does_not_leak(fmt, how):
    (dw,) = gradients(1)
    g = summed(fmt, [torch.full(SHAPE, math.nan)])
    g.zero()
    if how == "add":
        g.add(dw)
        assert torch.equal(value(g), value(summed(fmt, [dw])))
    else:
        g.zero_if_unused()
        assert (value(g) == 0).all()
        assert (g.value.scale == 1.0).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_settle_keeps_a_sum_and_may_be_followed_by_more(fmt):
    first, second = gradients(2)
    g = summed(fmt, [first])
    g.zero_if_unused()
    g.add(second)
    assert torch.equal(value(g), value(summed(fmt, [first, second])))


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_adding_to_a_settled_zero(fmt):
    (dw,) = gradients(1)
    g = accumulator(fmt)
    g.zero_if_unused()
    g.add(dw)
    assert torch.equal(value(g), KERNELS.dequantize(quantize(dw, fmt)))


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_zero_gradient(fmt):
    (dw,) = gradients(1)
    g = summed(fmt, [torch.zeros(SHAPE), torch.zeros(SHAPE)])
    assert (value(g) == 0).all()
    assert (g.value.scale == 1.0).all()
    g.add(dw)
    assert torch.equal(value(g), KERNELS.dequantize(quantize(dw, fmt)))


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES)
def test_micro_batch_gradient_is_neither_changed_nor_kept(fmt, dtype):
    terms = gradients(2, dtype)
    copies = [dw.clone() for dw in terms]
    g = summed(fmt, terms)
    for dw, copy in zip(terms, copies, strict=True):
        assert torch.equal(dw, copy)
    before = value(g).clone()
    for dw in terms:
        dw.fill_(7.0)
    assert torch.equal(value(g), before)


def test_scale_follows_a_growing_and_a_vanishing_gradient():
    (dw,) = gradients(1, torch.float32)
    g = summed(E4M3, [dw])
    scale = g.value.scale.clone()
    g.add(dw * 2.0**20)
    assert scale / 2.0**22 < g.value.scale < scale / 2.0**18
    g.zero()
    g.add(dw * 2.0**-20)
    assert g.value.scale == scale * 2.0**20


def test_rows_meet_a_whole_gradient_in_any_order():
    rows = torch.tensor([3, 0, 3, 11, 3])
    (dw,) = gradients(1)
    parts = torch.randn(5, 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = dw.double().index_add(0, rows, parts.double())
    for order in ("rows first", "rows last"):
        g = accumulator(FP32)
        g.value.payload.fill_(math.nan)  # what an earlier step left
        if order == "rows first":
            g.add_rows(rows, parts)
        g.add(dw)
        if order == "rows last":
            g.add_rows(rows, parts)
        torch.testing.assert_close(value(g).double(), expected, rtol=1e-6, atol=1e-6)


def test_rows_alone_start_from_zero():
    g = summed(FP32, [torch.ones(SHAPE)])
    g.zero()
    g.add_rows(torch.tensor([2, 2]), torch.ones(2, 20))
    assert value(g).sum(dim=1).tolist() == [0, 0, 40, *[0] * 9]


def test_a_frequent_row_is_summed_in_fp32():
    g = accumulator(FP32)
    g.add_rows(torch.zeros(3001, dtype=torch.int64), torch.ones(3001, 20).bfloat16())
    assert (value(g)[0] == 3001.0).all()  # bf16 would stop at 256


@pytest.mark.parametrize("fmt", [E4M3, BF16], ids=repr)
def test_rows_need_an_fp32_buffer(fmt):
    with pytest.raises(TypeError, match="rows are accumulated in fp32"):
        accumulator(fmt).add_rows(torch.tensor([0]), torch.ones(1, 20))


@pytest.mark.parametrize(("fmt", "nbytes"), [(E4M3, 1), (BF16, 2), (FP32, 4)], ids=repr)
def test_bytes_per_parameter(fmt, nbytes):
    assert accumulator(fmt).value.payload.nbytes == nbytes * 240


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("step", [4, 24, 100])
def test_how_many_rows_are_worked_on_together_does_not_show(fmt, step):
    kernels = ReferenceKernels(block_elements=7, step_elements=step)
    whole, parts = accumulator(fmt), MainGrad(SHAPE, fmt, kernels, CPU)
    for dw in gradients(4):
        whole.add(dw)
        parts.add(dw)
    assert torch.equal(parts.value.payload, whole.value.payload)
    assert torch.equal(parts.value.scale, whole.value.scale)
    sums = [k.square_sums_and_amaxes([g.value]) for k, g in ((KERNELS, whole), (kernels, parts))]
    torch.testing.assert_close(sums[0][0], sums[1][0], rtol=1e-12, atol=0.0)
    assert sums[0][1] == sums[1][1]
