"""Scales of blocks against a loop over the blocks."""

from __future__ import annotations

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.numerics import E4M3, E5M2, PER_ROW, PER_TENSOR, Granularity
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
    for operation in (lambda: quantized.view(-1), lambda: quantized.rows(0, 2)):
        with pytest.raises(TypeError, match="blocks of 1 x all"):
            operation()
    with pytest.raises(TypeError, match="fp32 of shape"):
        ScaledTensor(quantized.payload, torch.ones(()), E4M3, PER_ROW)
    with pytest.raises(ValueError, match="of a matrix"):
        PER_ROW.scale_shape((2, 3, 4))
    assert PER_TENSOR.scale_shape((2, 3, 4)) == ()
