"""LayerNorm and RMSNorm: within the rounding of their statistics and results of the exact ones."""

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.triton import norm, wide_norm
from fp8lm.kernels.triton.backend import TritonKernels
from tests.kernels.triton.compare import normal
from tests.kernels.triton.traffic import counting

KERNELS, REFERENCE = TritonKernels(), ReferenceKernels()
EPS = 1e-5
SHAPES = [(5, 2, 66), (1, 1), (3, 16), (0, 16), (9, 40), (2, 1030)]


def tensors(shape, dtype=torch.bfloat16, bias=True):
    """x, weight, bias, dy, and the residual path's gradient."""
    x, dy, residual = (normal(*shape, dtype=dtype) + 0.5 * i for i in range(3))
    weight = 1 + 0.1 * normal(shape[-1], dtype=torch.float32)
    shift = 0.1 * normal(shape[-1], dtype=torch.float32).flip(0)
    return x, weight.to(dtype), shift.to(dtype) if bias else None, dy.flip(-1), residual


def results(kernels, x, weight, bias, dy, residual):
    """The norm and its gradients on the device of `x`."""
    y, statistics = kernels.norm(x, weight, bias, EPS)
    return [y, *kernels.norm_backward(x, weight, bias, statistics, dy, EPS, residual)]


def to(device, values):
    return [None if value is None else value.to(device) for value in values]


def double(values):
    return [None if value is None else value.double() for value in values]


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, bias, adds, device):
    given = tensors(shape, dtype, bias)
    if not adds:
        given = (*given[:-1], None)
    mine, exact = results(KERNELS, *to(device, given)), results(REFERENCE, *double(given))
    rounding = torch.finfo(dtype).eps
    for place, (actual, expected) in enumerate(zip(mine, exact, strict=True)):
        assert actual.dtype == dtype and actual.shape == expected.shape
        # Terms of a few units cancel: in a result by columns, or in a sum over the rows.
        rows = 1 if place < 2 else math.prod(shape[:-1])
        absolute = 16 * 2.0**-24 * shape[-1] + 4 * rows * 2.0**-24 * math.sqrt(shape[-1])
        absolute += 4 * rounding if adds and place == 1 else 0.0  # two roundings, of large terms
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=rounding, atol=absolute)


@pytest.mark.parametrize("bias", [False, True])
def test_close_to_the_reference(bias, device):
    """But for the gradients of weight and bias, which PyTorch sums in bf16 on a CPU."""
    given = tensors((6, 130), bias=bias)
    mine, expected = results(KERNELS, *to(device, given)), results(REFERENCE, *given)
    for actual, reference in zip(mine[:2], expected[:2], strict=True):
        torch.testing.assert_close(actual.cpu(), reference, rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("event", [math.nan, math.inf])
def test_an_event_spoils_its_row(event, bias, device):
    x, weight, bias, dy, residual = to(device, tensors((6, 40), bias=bias))
    x[2, 7] = event
    y, dx, d_weight, *_ = results(KERNELS, x, weight, bias, dy, residual)
    rows = torch.arange(6, device=device) != 2
    assert torch.equal(y.isnan().any(dim=1), ~rows) and torch.equal(dx.isnan().any(dim=1), ~rows)
    assert d_weight.isnan().any()


def test_gradients_are_reproducible(device):
    given = to(device, tensors((20, 40)))
    for first, again in zip(results(KERNELS, *given), results(KERNELS, *given), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("columns", [norm.MAX_COLUMNS + 16, 12288])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_longer_than_registers(columns, bias, device):
    """In blocks of columns, of which the last may not be full."""
    given = tensors((3, columns), torch.float32, bias)
    mine = results(KERNELS, *to(device, given))
    for actual, expected in zip(mine, results(REFERENCE, *double(given)), strict=True):
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(KERNELS.amax(mine[1]), mine[1].abs().max())


@pytest.mark.slow
def test_blocks_are_as_whole_rows(device):
    """Both kernels on rows that either takes, more than programs; sums have another order."""
    x, weight, shift, dy, residual = to(device, tensors((130, 40)))
    (y, statistics, amaxes), blocks = (
        made.norm(x, weight, shift, EPS) for made in (norm, wide_norm)
    )
    assert torch.equal(y, blocks[0]) and torch.equal(amaxes, blocks[2])
    of_rows, of_blocks = (
        made.norm_backward(x, weight, shift, statistics, dy, residual)[0]
        for made in (norm, wide_norm)
    )
    for first, second in zip(of_rows, of_blocks, strict=True):
        torch.testing.assert_close(first, second, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.parametrize("bias", [False, True])
def test_declared_traffic(bias):
    x, weight, bias, dy, residual = tensors((5, 40), bias=bias)
    with counting() as traffic:
        results(KERNELS, x, weight, bias, dy, residual)
    assert traffic.measured == traffic.declared
    vectors = weight.nbytes * (1 if bias is None else 2)
    statistics = 4 * 5 * (1 if bias is None else 2)
    sums, of_columns = 2 * 5 * vectors, 2 * 40
    assert traffic.declared == [
        ("normalize", x.nbytes + vectors, x.nbytes + statistics + 4 * 5),
        ("norm_gradients", 3 * x.nbytes + statistics + of_columns, x.nbytes + sums + 4 * 5),
        ("add_rows", sums, vectors),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_declared_traffic_of_long_rows():
    """What is read twice counts once: the second time it comes from the cache."""
    given = tensors((2, norm.MAX_COLUMNS + 16))
    with counting() as traffic:
        results(KERNELS, *given)
    assert traffic.measured == traffic.declared
    names = [name for name, *_ in traffic.declared]
    assert names == ["normalize_blocks", "row_means", "block_gradients", "add_rows"]


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_programs_of_several_rows(bias, device):
    """More rows than programs; the amax that the next cast gets is of all of them."""
    given = tensors((530, 17), torch.float32, bias)
    mine = results(KERNELS, *to(device, given))
    for actual, expected in zip(mine, results(REFERENCE, *double(given)), strict=True):
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(KERNELS.amax(mine[1]), mine[1].abs().max())
