"""The partial maxima of a tensor."""

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.triton.amax import KnownAmaxes, partial_amaxes
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


@pytest.fixture
def known(device):
    """A tensor whose amax is remembered, and as what: not what a look at it would find."""
    x, memory = torch.ones(4, 6, device=device), KnownAmaxes(length=2)
    amaxes = torch.tensor([7.0, 5.0], device=device).view(torch.int32)
    assert memory.remember(x, amaxes) is x
    return x, memory, amaxes


def test_views_of_all_of_a_tensor_have_its_amax(known):
    x, memory, amaxes = known
    for view in (x, x.view(-1), x.view(2, 12), x.t(), x.detach()):
        assert memory.amaxes_of(view) is amaxes


def test_an_amax_is_not_that_of_a_part_or_a_copy(known):
    x, memory, _ = known
    for other in (x[:2], x[:, 1:], x.view(-1)[1:], x.clone(), x + 1.0):
        found = memory.amaxes_of(other).view(torch.float32)
        assert torch.equal(found.max(), other.abs().max())


def test_an_amax_is_forgotten_when_the_tensor_changes(known):
    x, memory, _ = known
    x.view(-1)[3].add_(2.0)
    assert memory.amaxes_of(x).view(torch.float32).max() == 3.0


def test_of_the_last_tensors_alone(known, device):
    x, memory, amaxes = known
    others = [memory.remember(torch.zeros(3, device=device), amaxes) for _ in range(2)]
    assert memory.amaxes_of(x).view(torch.float32).max() == 1.0
    assert all(memory.amaxes_of(other) is amaxes for other in others)


def test_memory_that_is_used_again_is_another_tensor(known, device):
    x, memory, amaxes = known
    shape = x.shape
    del x
    for _ in range(3):
        assert memory.amaxes_of(torch.zeros(shape, device=device)) is not amaxes
