"""What is known of a tensor is not taken for that of another, or of what it was."""

import pytest
import torch

from fp8lm.kernels.triton.backend import TritonKernels
from fp8lm.kernels.triton.memo import Memo
from tests.kernels.triton.compare import normal
from tests.kernels.triton.traffic import counting


@pytest.fixture
def known(device):
    """A tensor, and a memo of two tensors that has a fact about it."""
    x, memo, fact = torch.ones(4, 6, device=device), Memo(length=2), torch.tensor(7)
    assert memo.remember(x, fact) is x
    return x, memo, fact


def test_views_of_all_of_a_tensor_are_known(known):
    x, memo, fact = known
    for view in (x, x.view(-1), x.view(2, 12), x.t(), x.detach()):
        assert memo.recall(view) is fact


def test_parts_and_copies_are_not(known):
    x, memo, fact = known
    for other in (x[:2], x[:, 1:], x.view(-1)[1:], x.clone(), x + 1.0):
        assert memo.recall(other) is None
    assert memo.remember(x[:2], fact) is not None
    assert memo.recall(x[:2]) is None


def test_what_is_written_to_is_forgotten(known):
    x, memo, _ = known
    x.view(-1)[3].add_(2.0)
    assert memo.recall(x) is None


def test_the_last_tensors_alone_are_known(known, device):
    x, memo, fact = known
    others = [memo.remember(torch.zeros(3, device=device), fact) for _ in range(2)]
    assert memo.recall(x) is None
    assert all(memo.recall(other) is fact for other in others)


def test_memory_that_is_used_again_is_another_tensor(known, device):
    x, memo, _ = known
    shape = x.shape
    del x
    for _ in range(3):
        assert memo.recall(torch.zeros(shape, device=device)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_what_a_kernel_makes_is_cast_without_another_look():
    kernels, x = TritonKernels(), normal(32, 48)
    with counting() as traffic:
        y = kernels.gelu(x, "tanh")
        assert kernels.amax(y.view(-1)) == y.float().abs().max()
        kernels.amax(y + 1.0)
    assert [name for name, _, _ in traffic.declared] == ["gelu_values", "partial_amax"]
