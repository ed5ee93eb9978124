"""A query group that several ranks share: what each gets of it, and what goes back."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.ranks import random, sent, tensor_parallel

SEQUENCE, BATCH, FEATURES = 8, 2, 16


def gather_and_back(query_groups, dtype):
    """Relative to one process: output and gradient are equal; bytes sent in both directions."""
    tp = tensor_parallel(query_groups=query_groups)
    shared = tp.size // query_groups
    group = tp.rank // shared * shared
    everyone = random(SEQUENCE, BATCH, FEATURES * tp.size, seed=1, dtype=dtype).chunk(tp.size, 2)
    x = everyone[tp.rank].contiguous().requires_grad_()
    y = tp.gather_query_group(x)
    gathered = torch.equal(y, torch.cat(everyone[group : group + shared], 2))
    gradients = [random(*y.shape, seed=10 + rank, dtype=dtype) for rank in range(tp.size)]
    y.backward(gradients[tp.rank])
    total = sum(gradient.float() for gradient in gradients[group : group + shared])
    own = total.to(dtype).chunk(shared, 2)[tp.rank - group]
    close = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    return gathered, torch.allclose(x.grad, own, rtol=close, atol=close), shared, *sent(tp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "query_groups"), [(2, 1), (4, 1), (4, 2), (4, 4)])
def test_features_of_the_group_and_sums_of_their_gradients(
    run_distributed, size, query_groups, dtype
):
    """Values travel as they are, whatever the wires carry: no FP8 GEMM reads them."""
    for gathered, summed, shared, *counted in run_distributed(
        gather_and_back, size, query_groups, dtype
    ):
        assert gathered and summed
        per_direction = (shared - 1) * SEQUENCE * BATCH * FEATURES * dtype.itemsize
        assert counted == [per_direction, per_direction]
