"""Causal attention against a softmax written out in float64, grouped queries and gradients."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from fp8lm.batch import Documents
from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.attention import (
    FusedAttention,
    attention_at_positions,
    causal_attention,
    fused_attention,
)
from fp8lm.runtime.errors import InputError

KERNELS = ReferenceKernels()
FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
HEADS = [(4, 4), (4, 2), (6, 2), (4, 1)]


def inputs(heads, groups, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 9, 8), (2, groups, 9, 8), (2, groups, 9, 8), (2, heads, 9, 8)]
    q, k, v, dy = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v)], dy


def naive(q, k, v):
    heads_per_group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads_per_group, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v


def run(attention, operands, dy):
    y = attention(*operands)
    return y, *torch.autograd.grad(y, operands, dy)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients(heads, groups, dtype):
    operands, dy = inputs(heads, groups, dtype)
    results = run(lambda q, k, v: KERNELS.attention(q, k, v, 0.0), operands, dy)
    doubles = [x.detach().double().requires_grad_() for x in operands]
    expected = run(naive, doubles, dy.double())
    # Computed in fp32: what is left is fp32 rounding, and that of the result to its dtype.
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == dtype
        tolerance = dict(rtol=torch.finfo(dtype).eps, atol=3e-6)
        torch.testing.assert_close(result.double(), reference, **tolerance)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("attend", [KERNELS.attention_at, attention_at_positions])
def test_at_positions_of_a_cache(heads, attend):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, count, 20, 8) for count in (heads[0], heads[1], heads[1])]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    expected = KERNELS.attention(q, k, v, 0.0)
    positions = torch.tensor([[3, 19], [0, 7]])
    rows = torch.stack([q[b, :, positions[b]] for b in range(2)])
    found = attend(rows, k, v, positions)
    for b in range(2):
        torch.testing.assert_close(found[b], expected[b, :, positions[b]])


def test_no_position_sees_the_future():
    (q, k, v), _ = inputs(4, 2, torch.float32)
    before = KERNELS.attention(q, k, v, 0.0)
    with torch.no_grad():
        k[:, :, 5:] += 1.0
        v[:, :, 5:] -= 1.0
    after = KERNELS.attention(q, k, v, 0.0)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


def test_dropout_draws_from_the_random_state_and_keeps_the_mean():
    (q, k, v), _ = inputs(4, 2, torch.float32)
    torch.manual_seed(1)
    draws = [KERNELS.attention(q, k, v, 0.25) for _ in range(2)]
    torch.manual_seed(1)
    assert torch.equal(KERNELS.attention(q, k, v, 0.25), draws[0])
    assert not torch.equal(*draws)
    ones = torch.ones_like(v)
    means = torch.stack([KERNELS.attention(q, k, ones, 0.25).mean() for _ in range(100)])
    # Of one row with a single key: sd sqrt(p / (1 - p)) = 0.58; 72 rows, 100 draws.
    assert abs(means.mean() - 1.0) < 4 * 0.58 / math.sqrt(72 * 100)


def gradients_of(attention, operands, dy):
    return run(lambda *tensors: attention(*tensors, 0.0), operands, dy)


def flash_attention_3(result):
    """A stand-in of flash-attention 3: [B,S,N,D], and what it was called with."""
    calls = []

    def flash_attn_func(q, k, v, causal=False):
        calls.append((tuple(q.shape), tuple(k.shape), causal))
        return result(causal_attention(*(x.transpose(1, 2) for x in (q, k, v)), 0.0))

    return flash_attn_func, calls


@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_flash_attention_3_has_its_layout(heads, groups, with_sums):
    def result(context):
        context = context.transpose(1, 2)
        return (context, torch.zeros(1)) if with_sums else context

    function, calls = flash_attention_3(result)
    operands, dy = inputs(heads, groups, torch.bfloat16)
    actual = gradients_of(FusedAttention(function), operands, dy)
    assert all(map(torch.equal, actual, gradients_of(causal_attention, operands, dy)))
    assert calls == [((2, 9, heads, 8), (2, 9, groups, 8), True)]


def test_flash_attention_3_has_no_dropout():
    function, calls = flash_attention_3(lambda context: context)
    (q, k, v), _ = inputs(4, 2, torch.bfloat16)
    attention = FusedAttention(function, [FLASH, SDPBackend.MATH])
    torch.manual_seed(1)
    with torch.no_grad():
        assert not torch.equal(attention(q, k, v, 0.5), causal_attention(q, k, v, 0.0))
    assert not calls


def test_scores_are_never_formed_silently():
    """There is no cuDNN on a CPU."""
    (q, k, v), _ = inputs(4, 2, torch.bfloat16)
    with pytest.raises(InputError, match="4 query and 2 key heads of 8 features"):
        FusedAttention(backends=[CUDNN])(q, k, v, 0.0)


def test_fp32_is_left_to_pytorch():
    operands, dy = inputs(4, 2, torch.float32)
    pinned = gradients_of(FusedAttention(backends=[CUDNN]), operands, dy)
    assert all(map(torch.equal, pinned, gradients_of(causal_attention, operands, dy)))


def test_the_best_that_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # fails to import
    plain = fused_attention((9, 0)).description
    assert plain.startswith("cuDNN or flash")
    assert plain.endswith("; documents apart: flash attention (varlen_attn)")
    function, _ = flash_attention_3(lambda context: context)
    module = SimpleNamespace(flash_attn_func=function, flash_attn_varlen_func=function)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    pinned = plain.partition(";")[0]
    assert fused_attention((9, 0)).description == (
        f"flash-attention 3; with dropout {pinned}; documents apart: flash-attention 3"
    )
    assert fused_attention((8, 9)).description == fused_attention((10, 0)).description == plain


# Bounds at the first and at the last token, documents of one token, several of them in a row, and
# a sample of one document.
STARTS = torch.tensor([[0, 1, 1, 1, 4, 5, 5, 5, 8], [0] * 9])
DOCUMENTS = Documents.from_starts(STARTS)
BOUNDS = [[(0, 1), (1, 4), (4, 5), (5, 8), (8, 9)], [(0, 9)]]


# Probabilities, products and sums of up to nine keys are rounded to 2^-9 of about 1 as well.
IN_BF16 = dict(rtol=2.0**-7, atol=0.03)


def one_by_one(q, k, v):
    """Causal attention of one document after the other."""
    samples = []
    for b, bounds in enumerate(BOUNDS):
        parts = [[x[b : b + 1, :, i:j] for x in (q, k, v)] for i, j in bounds]
        samples.append(torch.cat([naive(*part) for part in parts], dim=2))
    return torch.cat(samples)


def varlen(q_TND, k_TGD, v_TGD, cu_seqlens, max_seqlen):
    """A stand-in of a kernel of variable length."""
    bounds = cu_seqlens.tolist()
    assert max_seqlen == max(j - i for i, j in pairwise(bounds))
    parts = [
        causal_attention(*(x[None, i:j].transpose(1, 2) for x in (q_TND, k_TGD, v_TGD)), 0.0)
        for i, j in pairwise(bounds)
    ]
    return torch.cat([part.transpose(1, 2)[0] for part in parts])


def flash_3_varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
    assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    return varlen(q, k, v, cu_seqlens_q, max_seqlen_q), torch.zeros(1)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [KERNELS, FusedAttention(varlen=varlen)], ids=["cpu", "gpu"])
def test_documents_are_as_one_by_one(heads, groups, dtype, kernels):
    operands, dy = inputs(heads, groups, dtype)
    mask = kernels.document_mask(DOCUMENTS, dtype)
    attend = kernels if isinstance(kernels, FusedAttention) else kernels.attention
    results = run(lambda q, k, v: attend(q, k, v, 0.0, mask), operands, dy)
    doubles = [x.detach().double().requires_grad_() for x in operands]
    expected = run(one_by_one, doubles, dy.double())
    in_bf16 = isinstance(kernels, FusedAttention) and dtype == torch.bfloat16
    tolerance = IN_BF16 if in_bf16 else dict(rtol=torch.finfo(dtype).eps, atol=3e-6)
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), reference, **tolerance)


def test_no_document_sees_another():
    """Bit for bit: what is masked has no weight at all. Longer than the blocks of the kernel."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1300, 8, generator=generator) for _ in range(3))
    starts = torch.zeros(1, 1300, dtype=torch.int64)
    starts[:, 700:] = 700
    mask = KERNELS.document_mask(Documents.from_starts(starts), q.dtype)
    before = KERNELS.attention(q, k, v, 0.0, mask)
    expected = KERNELS.attention(q[:, :, 700:], k[:, :, 700:], v[:, :, 700:], 0.0)
    torch.testing.assert_close(before[:, :, 700:], expected)
    k[:, :, :700] += 1.0
    v[:, :, :700] = 1e30
    after = KERNELS.attention(q, k, v, 0.0, mask)
    assert torch.equal(before[:, :, 700:], after[:, :, 700:])


def test_flash_attention_3_computes_documents(monkeypatch):
    function, calls = flash_attention_3(lambda context: context)
    module = SimpleNamespace(flash_attn_func=function, flash_attn_varlen_func=flash_3_varlen)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    attention, (operands, dy) = fused_attention((9, 0)), inputs(4, 2, torch.bfloat16)
    mask = attention.document_mask(DOCUMENTS, torch.bfloat16)
    assert mask.scores is None
    actual = run(lambda q, k, v: attention(q, k, v, 0.0, mask), operands, dy)
    plain = FusedAttention(varlen=varlen)
    expected = run(lambda q, k, v: plain(q, k, v, 0.0, mask), operands, dy)
    assert all(map(torch.equal, actual, expected)) and not calls


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_documents_on_a_gpu(heads, groups):
    """By what is selected there; BF16 rounds within attention, too."""
    operands, dy = inputs(heads, groups, torch.bfloat16)
    reference = KERNELS.document_mask(DOCUMENTS, torch.bfloat16)
    expected = run(lambda q, k, v: KERNELS.attention(q, k, v, 0.0, reference), operands, dy)
    attention, device = fused_attention(torch.cuda.get_device_capability()), torch.device("cuda")
    mask = attention.document_mask(DOCUMENTS.to(device), torch.bfloat16)
    there = [x.detach().to(device).requires_grad_() for x in operands]
    actual = run(lambda q, k, v: attention(q, k, v, 0.0, mask), there, dy.to(device))
    for result, cpu in zip(actual, expected, strict=True):
        torch.testing.assert_close(result.cpu(), cpu, **IN_BF16)


@pytest.mark.slow
def test_pytorchs_kernel_takes_what_it_is_given():
    """On the meta device, where it computes nothing: it is a GPU's."""
    q, k, v = (torch.empty(2, n, 9, 8, dtype=torch.bfloat16, device="meta") for n in (4, 2, 2))
    documents = DOCUMENTS.to(torch.device("meta"))
    attention = FusedAttention()
    operands = [x.requires_grad_() for x in (q, k, v)]
    y = attention(*operands, 0.0, attention.document_mask(documents, q.dtype))
    assert y.shape == q.shape and y.dtype == q.dtype
    gradients = torch.autograd.grad(y, operands, y)
    assert [gradient.shape for gradient in gradients] == [x.shape for x in operands]


@pytest.mark.parametrize(
    "size, dropout, named", [(8, 0.5, "attention_dropout = 0.5"), (12, 0.0, "kv_channels = 12")]
)
def test_documents_that_no_kernel_takes(size, dropout, named):
    q = torch.zeros(2, 4, 9, size, dtype=torch.bfloat16)
    attention = FusedAttention()
    with pytest.raises(InputError, match=named):
        attention(q, q, q, dropout, attention.document_mask(DOCUMENTS, q.dtype))
