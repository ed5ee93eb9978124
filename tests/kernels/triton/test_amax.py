"""The partial maxima of a tensor."""

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.triton.amax import partial_amaxes
from tests.kernels.triton.traffic import counting


def amax(x, **options):
    return partial_amaxes(x, **options).max().view(torch.float32).cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 7, 8192, 20001])
def test_amax_of_any_size(dtype, size, device):
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(amax(x.to(device)), ReferenceKernels().amax(x))


def test_amax_of_more_blocks_than_programs(device):
    x = torch.zeros(8192 * 7 + 5, dtype=torch.bfloat16)
    x[-1] = -3.0
    assert amax(x.to(device), max_parts=3) == 3.0


@pytest.mark.parametrize("special", [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45])
def test_nothing_special_is_lost(special, device):
    x = torch.zeros(9000)
    x[8500] = special
    found = amax(x.to(device))
    assert math.isnan(found) if math.isnan(special) else found == abs(torch.tensor(special))
    assert not found.signbit()


def test_nan_is_larger_than_infinity(device):
    assert amax(torch.tensor([math.inf, math.nan, 1.0], device=device)).isnan()


def test_empty(device):
    assert amax(torch.empty(0, device=device)) == 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_declared_traffic():
    with counting() as traffic:
        partial_amaxes(torch.randn(20001).bfloat16())
    assert traffic.measured == traffic.declared == [("partial_amax", 40002, 12)]
