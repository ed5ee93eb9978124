"""Heads of a fused projection, split and rotated: the gradient is that of autograd."""

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.model.rope import rope_tables, rotated_heads

KERNELS, CPU = ReferenceKernels(), torch.device("cpu")
S, B, D = 7, 2, 8


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("percent", [1.0, 0.5])
@pytest.mark.parametrize(
    "groups, queries", [(3, slice(0, 1)), (2, slice(0, 4)), (1, slice(0, 2)), (1, slice(1, 3))]
)
def test_gradient_of_rotated_heads(groups, queries, percent):
    qkv = random(S, B, groups, queries.stop + 3, D).double().requires_grad_()
    tables = tuple(table.double() for table in rope_tables(S, D, 100.0, percent, CPU))
    assert torch.autograd.gradcheck(
        lambda x: rotated_heads(x, tables, queries, KERNELS), qkv, fast_mode=True
    )
    q, k, v = rotated_heads(qkv, tables, queries, KERNELS)
    assert q.shape == (S, B, groups * (queries.stop - queries.start), D)
    assert k.shape == v.shape == (S, B, groups, D)
    position_zero = qkv[0, :, :, queries].reshape(q[0].shape)
    assert torch.equal(q[0], position_zero) and torch.equal(v, qkv[..., -1, :])
