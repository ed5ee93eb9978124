"""Rotary position embedding: the reference's bits, in every layout that attention leaves."""

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.triton.backend import TritonKernels
from fp8lm.model.rope import rope_tables
from tests.kernels.triton.compare import assert_same_values, normal
from tests.kernels.triton.traffic import counting

pytestmark = pytest.mark.slow

KERNELS, REFERENCE = TritonKernels(), ReferenceKernels()
S, B = 5, 2
# Groups, heads of one in the projection, those of its queries that are wanted.
HEADS = {
    "as many keys as queries": (3, 3, slice(0, 1)),
    "grouped": (2, 6, slice(0, 4)),
    "a part of the only group": (1, 6, slice(2, 4)),
    "many": (9, 5, slice(0, 3)),
}
DENSE = (0, 1, 2, 3)
LAYOUTS = {"SBND": DENSE, "BSND": (1, 0, 2, 3), "BNSD": (1, 2, 0, 3), "DNSB": (3, 2, 0, 1)}


def tables(size, percent, dtype, *, of_samples=False):
    cos, sin = (table.to(dtype) for table in rope_tables(S * B, size, 100.0, percent, "cpu"))
    if not of_samples:
        return cos[:S], sin[:S]
    positions = torch.arange(S * B).flip(0).view(S, B)
    return cos[positions].squeeze(2), sin[positions].squeeze(2)


def laid_out(x, order):
    """`x` with dimensions that lie in memory in this order."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "size, percent, dtype",
    [
        (8, 1.0, torch.bfloat16),
        (6, 1.0, torch.float32),
        (20, 0.5, torch.bfloat16),
        (16, 0.25, torch.float32),
        (4, 0.0, torch.bfloat16),
    ],
)
def test_forward(heads, size, percent, dtype, device):
    groups, of_group, queries = HEADS[heads]
    qkv, rope = normal(S, B, groups, of_group, size, dtype=dtype), tables(size, percent, dtype)
    expected = REFERENCE.rope(qkv, *rope, queries)
    actual = KERNELS.rope(qkv.to(device), *(table.to(device) for table in rope), queries)
    for mine, reference in zip(actual, expected, strict=True):
        assert_same_values(mine, reference)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "size, percent, layout",
    [(8, 1.0, "SBND"), (6, 1.0, "BSND"), (20, 0.5, "BNSD"), (16, 0.25, "DNSB")],
)
def test_backward(heads, size, percent, layout, device):
    groups, of_group, queries = HEADS[heads]
    counts = (groups * (queries.stop - queries.start), groups, groups)
    gradients = [laid_out(normal(S, B, count, size), LAYOUTS[layout]) for count in counts]
    rope = tables(size, percent, torch.bfloat16)
    expected = REFERENCE.rope_backward(tuple(gradients), *rope, queries, of_group)
    there = tuple(gradient.to(device) for gradient in gradients)
    actual = KERNELS.rope_backward(there, *(t.to(device) for t in rope), queries, of_group)
    assert_same_values(actual, expected)


@pytest.mark.parametrize("event", [math.nan, math.inf])
def test_positions_of_samples_and_events(event, device):
    groups, of_group, queries = HEADS["grouped"]
    qkv = normal(S, B, groups, of_group, 8)
    qkv[2, 1, 1, 3, 5] = event
    rope = tables(8, 1.0, qkv.dtype, of_samples=True)
    there = tuple(table.to(device) for table in rope)
    expected = REFERENCE.rope(qkv, *rope, queries)
    actual = KERNELS.rope(qkv.to(device), *there, queries)
    for mine, reference in zip(actual, expected, strict=True):
        assert_same_values(mine, reference)
    back = KERNELS.rope_backward(actual, *there, queries, of_group)
    assert_same_values(back, REFERENCE.rope_backward(expected, *rope, queries, of_group))


def test_no_tokens(device):
    qkv, rope = normal(0, B, 2, 3, 8).to(device), tables(8, 1.0, torch.bfloat16)
    rope = tuple(table[:0].to(device) for table in rope)
    q, k, v = KERNELS.rope(qkv, *rope, slice(0, 1))
    assert q.shape == k.shape == v.shape == (0, B, 2, 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.parametrize("of_samples", [False, True])
def test_declared_traffic(of_samples):
    groups, of_group, queries = HEADS["a part of the only group"]
    qkv = normal(S, B, groups, of_group, 20)
    rope = tables(20, 0.5, torch.bfloat16, of_samples=of_samples)
    with counting() as traffic:
        q, k, v = KERNELS.rope(qkv, *rope, queries)
        KERNELS.rope_backward((q, k, v.contiguous()), *rope, queries, of_group)
    assert traffic.measured == traffic.declared
    head, halves = 2 * S * B * 20, 2 * 2 * S * 5 * (B if of_samples else 1)
    assert traffic.declared == [
        ("rotate_heads", 3 * head + halves, 3 * head),
        ("join_heads", 4 * head + halves, 6 * head + 4 * S * B),
    ]
