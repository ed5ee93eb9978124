"""Sums of tensors of one shape, in fp32 and in a fixed order: one launch for all terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.messages import Messages, memory_of
from fp8lm.kernels.triton.numbers import decode, encode, fact, inverse_of
from fp8lm.kernels.triton.rows import group, row_length, rows_at_once, unscale_rows, warps
from fp8lm.numerics import BF16, E2M5, FP32
from fp8lm.scaled_tensor import ScaledTensor

_BLOCK = 2048


@dataclass(frozen=True)
class Terms:
    """Terms that lie at equal distances in one memory; `own` is another, number `at` of them all.

    Received messages are that, and what this rank has not sent to itself. `length` elements have
    one scale; None: all of them.
    """

    received: Messages
    own: ScaledTensor | Tensor | None
    at: int
    length: int | None

    @classmethod
    def of(cls, terms: Sequence[ScaledTensor | Tensor]) -> Terms | None:
        """None where these are not what the kernels add up."""
        at = _apart(terms)
        own = None if at is None else terms[at]
        others = [term for number, term in enumerate(terms) if number != at]
        scaled = [term for term in others if isinstance(term, ScaledTensor)]
        received = Messages.of(scaled) if scaled and len(scaled) == len(others) else None
        if received is None or not _fits(own, scaled[0]):
            return None
        fmt, granularity = scaled[0].format, scaled[0].granularity
        length = None
        if not granularity.is_per_tensor:
            length = row_length(scaled[0].shape, granularity)
        # One scale of E2M5 is no power of two, and bf16, by which the reference decodes, not exact.
        if fmt.root or (length is None and (fmt == E2M5 or not granularity.is_per_tensor)):
            return None
        return cls(received, own, -1 if at is None else at, length)


def _apart(terms: Sequence[ScaledTensor | Tensor]) -> int | None:
    """The number of the one term that is no message, or lies in another memory."""
    plain = [number for number, term in enumerate(terms) if isinstance(term, Tensor)]
    if plain:
        return plain[0]
    where = [memory_of(term.payload) for term in terms if isinstance(term, ScaledTensor)]
    alone = [number for number, memory in enumerate(where) if where.count(memory) == 1]
    return alone[-1] if alone and len(terms) > 1 else None


def _fits(own: ScaledTensor | Tensor | None, other: ScaledTensor) -> bool:
    if own is None:
        return True
    if isinstance(own, Tensor):
        return own.is_contiguous() and own.dtype in (torch.bfloat16, torch.float32)
    alike = (own.format, own.granularity) == (other.format, other.granularity)
    return alike and own.payload.is_contiguous() and own.scale.is_contiguous()


def sum_in_order(terms: Terms, dtype: torch.dtype, divisor: int) -> Tensor:
    """The sum of `terms` over `divisor`, rounded to `dtype`."""
    received, own = terms.received, terms.own
    first, count = received.tensors[0], len(received.tensors)
    total = torch.empty(first.shape, dtype=dtype, device=first.device)
    reads = received.operands
    payload, scale, own_format = first.payload, first.scale, first.format.name
    if isinstance(own, ScaledTensor):
        payload, scale = own.payload, own.scale
        reads += [payload, scale] if own.format.scaled else [payload]
    elif own is not None:
        payload, own_format = own, (BF16 if own.dtype == torch.bfloat16 else FP32).name
        reads.append(own)
    operands = (first.payload, first.scale, payload, scale, total)
    numbers = (received.payload.stride, received.scale.stride, count, terms.at, float(divisor))
    options: dict[str, Any] = dict(
        reads=reads,
        writes=[total],
        FORMAT=first.format.name,
        OWN_FORMAT=own_format,
        DIVIDES=int(divisor != 1),
    )
    if terms.length is None:
        grid = max(1, triton.cdiv(total.numel(), _BLOCK))
        launch(sum_terms, (grid,), *operands, total.numel(), *numbers, BLOCK=_BLOCK, **options)
        return total
    num_rows, (width, _) = first.scale.numel(), rows_at_once(terms.length)
    options |= dict(ROWS=max(1, _BLOCK // width), WIDTH=width, num_warps=warps(width))
    grid = triton.cdiv(num_rows, options["ROWS"])
    launch(sum_rows, (grid,), *operands, num_rows, terms.length, *numbers, **options)
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
def value_of(payload_ptr, scale_ptr, offsets, inside, FORMAT: tl.constexpr):
    """Values of a tensor with one scale."""
    value = decode(tl.load(payload_ptr + offsets, mask=inside), FORMAT)
    if fact(FORMAT, "scaled"):
        value = value * inverse_of(tl.load(scale_ptr))
    return value


@triton.jit
def sum_terms(
    payload_ptr,
    scale_ptr,
    own_ptr,
    own_scale_ptr,
    total_ptr,
    numel,
    payload_stride,
    scale_stride,
    count,
    at,
    divisor,
    FORMAT: tl.constexpr,
    OWN_FORMAT: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The kernel of `sum_in_order`: `count` messages, and before number `at` of them one's own."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    total = tl.zeros((BLOCK,), tl.float32)
    for term in range(count):
        if term == at:
            total += value_of(own_ptr, own_scale_ptr, offsets, inside, OWN_FORMAT)
        total += value_of(payload_ptr, scale_ptr, offsets, inside, FORMAT)
        payload_ptr += payload_stride
        scale_ptr += scale_stride
    if at == count:
        total += value_of(own_ptr, own_scale_ptr, offsets, inside, OWN_FORMAT)
    if DIVIDES:
        total = tl.math.div_rn(total, tl.full(total.shape, divisor, tl.float32))
    tl.store(total_ptr + offsets, total, mask=inside)


@triton.jit
def rows_of(payload_ptr, scale_ptr, rows, place, inside, num_rows, FORMAT: tl.constexpr):
    """Values of rows with a scale each; of a format without scales, as they are."""
    value = decode(tl.load(payload_ptr + place, mask=inside, other=0), FORMAT)
    if fact(FORMAT, "scaled"):
        scale = tl.load(scale_ptr + rows, mask=rows < num_rows, other=1.0)
        value = unscale_rows(value, scale, FORMAT)
    return value


@triton.jit
def sum_rows(
    payload_ptr,
    scale_ptr,
    own_ptr,
    own_scale_ptr,
    total_ptr,
    num_rows,
    length,
    payload_stride,
    scale_stride,
    count,
    at,
    divisor,
    FORMAT: tl.constexpr,
    OWN_FORMAT: tl.constexpr,
    DIVIDES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The same of terms whose rows have a scale each."""
    rows, place, inside = group(tl.program_id(0) * ROWS, num_rows, length, ROWS, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for term in range(count):
        if term == at:
            total += rows_of(own_ptr, own_scale_ptr, rows, place, inside, num_rows, OWN_FORMAT)
        total += rows_of(payload_ptr, scale_ptr, rows, place, inside, num_rows, FORMAT)
        payload_ptr += payload_stride
        scale_ptr += scale_stride
    if at == count:
        total += rows_of(own_ptr, own_scale_ptr, rows, place, inside, num_rows, OWN_FORMAT)
    if DIVIDES:
        total = tl.math.div_rn(total, tl.full(total.shape, divisor, tl.float32))
    tl.store(total_ptr + place, total, mask=inside)


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
