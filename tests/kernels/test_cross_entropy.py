"""The reference's cross-entropy: PyTorch's values and gradients, bit for bit on one rank."""

import pytest
import torch
from torch.nn import functional

from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.cross_entropy import cross_entropy
from fp8lm.layers.tp_context import NO_TP
from tests.kernels.triton.compare import normal

KERNELS = ReferenceKernels()


@pytest.mark.parametrize("used", [50, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_rank_has_the_bits_of_pytorch(used, dtype):
    mine = normal(9, 64, dtype=dtype, scale=4.0).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    labels, dy = torch.arange(9) * 5, normal(9, dtype=torch.float32)
    losses = cross_entropy(mine, labels, used, NO_TP, KERNELS)
    expected = functional.cross_entropy(theirs[:, :used].float(), labels, reduction="none")
    assert torch.equal(losses, expected)
    losses.backward(dy)
    expected.backward(dy)
    assert torch.equal(mine.grad, theirs.grad)
    assert not mine.grad[:, used:].any()
