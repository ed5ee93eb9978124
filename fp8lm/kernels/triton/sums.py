"""Sums of tensors of one shape, in fp32 and in a fixed order: one launch for all terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import decode, encode, inverse_of
from fp8lm.scaled_tensor import ScaledTensor

MAX_TERMS = 64  # whose pointers are arguments of one kernel
_BLOCK = 2048  # 16 numbers a thread: those of several terms are in registers at once


def sum_in_order(terms: Sequence[ScaledTensor], dtype: torch.dtype) -> Tensor:
    """The sum of contiguous `terms` of one format, each with one scale, rounded to `dtype`."""
    total = torch.empty(terms[0].shape, dtype=dtype, device=terms[0].device)
    payloads, scales = tuple(term.payload for term in terms), tuple(term.scale for term in terms)
    launch(
        sum_terms,
        (max(1, triton.cdiv(total.numel(), _BLOCK)),),
        payloads,
        scales,
        total,
        total.numel(),
        reads=[*payloads, *scales],
        writes=[total],
        FORMAT=terms[0].format.name,
        BLOCK=_BLOCK,
    )
    return total


def add_in_format(a: ScaledTensor, b: ScaledTensor) -> ScaledTensor:
    """`a + b` with the scale of both; contiguous, of one format."""
    payload = torch.empty_like(a.payload)
    launch(
        add_with_scale,
        (max(1, triton.cdiv(payload.numel(), _BLOCK)),),
        a.payload,
        a.scale,
        b.payload,
        b.scale,
        payload,
        payload.numel(),
        reads=[a.payload, a.scale, b.payload, b.scale],
        writes=[payload],
        FORMAT=a.format.name,
        BLOCK=_BLOCK,
    )
    return ScaledTensor(payload, a.scale, a.format)


@triton.jit
def sum_terms(
    payload_ptrs, scale_ptrs, total_ptr, numel, FORMAT: tl.constexpr, BLOCK: tl.constexpr
):
    """The kernel of `sum_in_order`; unrolled over the terms."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for term in tl.static_range(len(payload_ptrs)):
        code = tl.load(payload_ptrs[term] + offsets, mask=offsets < numel)
        total += decode(code, FORMAT) * inverse_of(tl.load(scale_ptrs[term]))
    tl.store(total_ptr + offsets, total, mask=offsets < numel)


@triton.jit
def add_with_scale(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    sum_ptr,
    numel,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The kernel of `add_in_format`."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(a_scale_ptr)
    a = tl.load(a_ptr + offsets, mask=offsets < numel)
    b = tl.load(b_ptr + offsets, mask=offsets < numel)
    sum = decode(a, FORMAT) * inverse_of(scale) + decode(b, FORMAT) * inverse_of(
        tl.load(b_scale_ptr)
    )
    tl.store(sum_ptr + offsets, encode(sum * scale, FORMAT), mask=offsets < numel)
