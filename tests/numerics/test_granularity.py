"""Scales of blocks against a loop over the blocks."""

from __future__ import annotations

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.numerics import E2M5, E4M3, E5M2, PER_ROW, PER_TENSOR, Granularity, granularity_of
from fp8lm.scaled_tensor import ScaledTensor

KERNELS = ReferenceKernels()
BLOCKS = [
    PER_ROW,
    Granularity(None, 1),
    Granularity(1, 128),
    Granularity(16, 32),
    Granularity(7, 5),
]
SHAPE = (48, 300)


def wide(seed=0):
    """Sizes over 24 binades, so that a scale of another block would show."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator)
    return x * torch.exp2(torch.randint(-12, 12, SHAPE, generator=generator).float())


def spans(size, block):
    block = size if block is None else block
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]


@pytest.mark.parametrize("granularity", BLOCKS, ids=str)
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_is_cast_as_a_tensor_of_its_own(granularity, fmt, dtype):
    x = wide().to(dtype)
    quantized = KERNELS.quantize(x, fmt, granularity=granularity)
    values = KERNELS.dequantize(quantized)
    rows, columns = spans(SHAPE[0], granularity.rows), spans(SHAPE[1], granularity.columns)
    assert quantized.scale.shape == (len(rows), len(columns))
    for i, own_rows in enumerate(rows):
        for j, own_columns in enumerate(columns):
            block = KERNELS.quantize(x[own_rows, own_columns].float().contiguous(), fmt)
            assert quantized.scale[i, j] == block.scale
            assert torch.equal(values[own_rows, own_columns], KERNELS.dequantize(block))


@pytest.mark.parametrize("granularity", BLOCKS, ids=str)
def test_a_fault_stays_in_its_block(granularity):
    x = wide()
    x[3, 7] = torch.nan
    values = KERNELS.dequantize(KERNELS.quantize(x, E4M3, granularity=granularity))
    faulty = granularity.expand(granularity.max(x.isnan().float()), SHAPE).expand(SHAPE) > 0
    assert values.isnan().equal(faulty)


@pytest.mark.parametrize("granularity", BLOCKS, ids=str)
def test_a_transposed_matrix_keeps_its_values(granularity):
    quantized = KERNELS.quantize(wide(), E4M3, granularity=granularity)
    transposed = quantized.t()
    assert transposed.granularity == granularity.transposed()
    assert torch.equal(KERNELS.dequantize(transposed), KERNELS.dequantize(quantized).t())


def test_what_has_no_meaning_for_blocks_is_refused():
    quantized = KERNELS.quantize(wide(), E4M3, granularity=PER_ROW)
    tall = KERNELS.quantize(wide(), E4M3, granularity=Granularity(2, 8))
    for operation, blocks in (
        (lambda: quantized.view(-1), "1 x all"),
        (lambda: tall.rows(0, 2), "2 x 8"),
    ):
        with pytest.raises(TypeError, match=blocks):
            operation()
    with pytest.raises(ValueError, match="2 x 8"):
        tall.elements(0, 16)
    with pytest.raises(TypeError, match="fp32 of shape"):
        ScaledTensor(quantized.payload, torch.ones(()), E4M3, PER_ROW)
    with pytest.raises(ValueError, match="of a matrix"):
        PER_ROW.scale_shape((2, 3, 4))
    assert PER_TENSOR.scale_shape((2, 3, 4)) == ()


def blocks(rows=6, block=8):
    """A matrix with a scale for each of three blocks of a row."""
    x = wide()[:rows, : 3 * block].contiguous()
    return KERNELS.quantize(x, E2M5, granularity=Granularity(1, block))


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 5), (3, 3)])
def test_rows_keep_their_scales(start, stop):
    whole, rows = blocks(), blocks().rows(start, stop)
    assert torch.equal(KERNELS.dequantize(rows), KERNELS.dequantize(whole)[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(0, 144), (8, 40), (96, 10**6), (144, 200)])
def test_elements_are_those_in_memory(start, stop):
    whole = blocks()
    values = KERNELS.dequantize(whole.elements(start, stop)).view(-1)
    assert torch.equal(values, KERNELS.dequantize(whole).view(-1)[start:stop])


def test_elements_start_and_stop_between_blocks():
    for start, stop in ((4, 16), (8, 20)):
        with pytest.raises(ValueError, match="whole blocks of 8"):
            blocks().elements(start, stop)


@pytest.mark.parametrize(
    ("columns", "block"), [(4096, 128), (12288, 128), (192, 64), (80, 16), (32, 32)]
)
def test_blocks_of_a_sum_divide_its_rows(columns, block):
    assert granularity_of(E2M5, (3, columns)) == Granularity(1, block)
    assert granularity_of(E4M3, (3, columns)) == PER_TENSOR
