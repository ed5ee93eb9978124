"""Rows added to rows of a table, the gradient of an embedding: the same bits every time."""

from __future__ import annotations

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.hopper import HopperKernels

ROWS, COLUMNS, COUNT = 37, 20, 4000


def operands(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(ROWS, (COUNT,), generator=generator)
    values = torch.randn(COUNT, COLUMNS, generator=generator).bfloat16()
    total = torch.randn(ROWS, COLUMNS, generator=generator)
    return total.to(device), rows.to(device), values.to(device)


def added(kernels, device="cpu"):
    total, rows, values = operands(device)
    kernels.add_rows_(total, rows, values)
    return total.cpu()


def exact():
    total, rows, values = operands()
    return total.double().index_add_(0, rows, values.double())


@pytest.mark.parametrize("kernels", [ReferenceKernels(), HopperKernels()], ids=lambda k: type(k))
def test_sums(kernels):
    """About 100 terms of a row, and as many roundings to fp32."""
    torch.testing.assert_close(added(kernels).double(), exact(), rtol=100 * 2.0**-24, atol=1e-5)


@pytest.mark.gpu
def test_sums_of_a_gpu_have_an_order():
    first = added(HopperKernels(), "cuda")
    torch.testing.assert_close(first.double(), exact(), rtol=100 * 2.0**-24, atol=1e-5)
    assert all(torch.equal(added(HopperKernels(), "cuda"), first) for _ in range(20))
