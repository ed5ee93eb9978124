"""Rotary position embedding of a fused projection: one launch each way, without copies beside it.

Forward reads queries and keys where the projection has them. Backward joins the three gradients,
which attention leaves in layouts of its own, to that of the projection, and finds the amax of the
result, which is the next GEMM's output gradient. Products and sums are
rounded as eager PyTorch rounds them, so that the results have the reference's bits.

Shapes: see `fp8lm.kernels.rope`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.amax import MAX_PARTS
from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import magnitude

_ELEMENTS = 2048  # of the first half of the rotated features, in a program
_JOINED = 1024  # the same in backward, where a number comes from one of three tensors


def split_and_rotate(
    qkv_SBGHD: Tensor, cos: Tensor, sin: Tensor, queries: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels.rope`; the values are a view of the projection."""
    qkv_SBGHD = qkv_SBGHD.contiguous()
    S, B, G, H, D = qkv_SBGHD.shape
    count = queries.stop - queries.start
    q_SBND, k_SBGD = (qkv_SBGHD.new_empty(S, B, heads, D) for heads in (G * count, G))
    read = [qkv_SBGHD[..., queries, :], qkv_SBGHD[..., -2, :]]
    tables = _half(cos), _half(sin)
    sizes, constants = _shape_of_launch(qkv_SBGHD.shape, cos, _ELEMENTS)
    launch(
        rotate_heads,
        (S * B, triton.cdiv(G * H, constants["ROWS"])),
        qkv_SBGHD,
        *tables,
        q_SBND,
        k_SBGD,
        queries.start,
        count,
        *sizes,
        reads=[*read, *tables],
        writes=[q_SBND, k_SBGD],
        **constants,
    )
    return q_SBND, k_SBGD, qkv_SBGHD[..., -1, :]


def rotate_back_and_join(
    gradients: tuple[Tensor, Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    queries: slice,
    heads_per_group: int,
) -> tuple[Tensor, Tensor]:
    """See `Kernels.rope_backward`; and the maxima of parts of the result (see `amax`)."""
    dq_SBND, dk_SBGD, dv_SBGD = (_with_dense_rows(gradient) for gradient in gradients)
    S, B, G, D = dk_SBGD.shape
    dqkv_SBGHD = dk_SBGD.new_empty(S, B, G, heads_per_group, D)
    tables = _half(cos), _half(sin)
    sizes, constants = _shape_of_launch(dqkv_SBGHD.shape, cos, _JOINED)
    blocks = max(1, triton.cdiv(G * heads_per_group, constants["ROWS"]))
    over_tokens = max(1, min(S * B, MAX_PARTS // blocks))
    amaxes = torch.empty(over_tokens * blocks, dtype=torch.int32, device=dqkv_SBGHD.device)
    launch(
        join_heads,
        (over_tokens, blocks),
        dq_SBND,
        dk_SBGD,
        dv_SBGD,
        *tables,
        dqkv_SBGHD,
        amaxes,
        *dq_SBND.stride()[:3],
        *dk_SBGD.stride()[:3],
        *dv_SBGD.stride()[:3],
        S * B,
        B,
        queries.start,
        queries.stop - queries.start,
        *sizes,
        reads=[dq_SBND, dk_SBGD, dv_SBGD, *tables],
        writes=[dqkv_SBGHD, amaxes],
        **constants,
    )
    return dqkv_SBGHD, amaxes


def _half(table: Tensor) -> Tensor:
    """[positions, R/2]: the other half of a table is the same."""
    return table.contiguous().flatten(0, -2)[:, : table.shape[-1] // 2]


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shape_of_launch(
    shape: torch.Size, cos: Tensor, elements: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Sizes that both kernels get last, and their compile-time constants."""
    _, B, G, H, D = shape
    rotated = cos.shape[-1]
    tokens_of_a_position = 1 if cos.shape[1] == B else B
    half = triton.next_power_of_2(max(1, rotated // 2))
    rest = triton.next_power_of_2(D - rotated) if rotated < D else 0
    constants = {"ROWS": max(1, elements // half), "HALF": half, "REST": rest}
    return (tokens_of_a_position, G, H, D, rotated), constants


@triton.jit
def rotate_heads(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    first_query,
    num_queries,
    tokens_of_a_position,
    G,
    H,
    D,
    rotated,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """Heads of one token: queries and keys rotated, to tensors of their own."""
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    group, head = rows // H, rows % H
    is_query = (rows < G * H) & (head >= first_query) & (head < first_query + num_queries)
    is_key = (rows < G * H) & (head == H - 2)
    source = qkv_ptr + (token * G * H + rows)[:, None] * D
    to_query = q_ptr + ((token * G + group) * num_queries + head - first_query)[:, None] * D
    to_key = k_ptr + (token * G + group)[:, None] * D

    half, i = rotated // 2, tl.arange(0, HALF)
    inside = (i < half)[None, :]
    cos, sin = _angles(cos_ptr, sin_ptr, token // tokens_of_a_position, rotated, HALF)
    is_read = (is_query | is_key)[:, None] & inside
    low = tl.load(source + i[None, :], mask=is_read)
    high = tl.load(source + half + i[None, :], mask=is_read)
    new_low, new_high = _turned(low, high, cos, sin)
    for_query, for_key = is_query[:, None] & inside, is_key[:, None] & inside
    tl.store(to_query + i[None, :], new_low, mask=for_query)
    tl.store(to_query + half + i[None, :], new_high, mask=for_query)
    tl.store(to_key + i[None, :], new_low, mask=for_key)
    tl.store(to_key + half + i[None, :], new_high, mask=for_key)
    if REST:
        i = rotated + tl.arange(0, REST)
        for_query = is_query[:, None] & (i < D)[None, :]
        for_key = is_key[:, None] & (i < D)[None, :]
        rest = tl.load(source + i[None, :], mask=for_query | for_key)
        tl.store(to_query + i[None, :], rest, mask=for_query)
        tl.store(to_key + i[None, :], rest, mask=for_key)


@triton.jit
def join_heads(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cos_ptr,
    sin_ptr,
    dqkv_ptr,
    amax_ptr,
    dq_stride_s,
    dq_stride_b,
    dq_stride_n,
    dk_stride_s,
    dk_stride_b,
    dk_stride_g,
    dv_stride_s,
    dv_stride_b,
    dv_stride_g,
    num_tokens,
    B,
    first_query,
    num_queries,
    tokens_of_a_position,
    G,
    H,
    D,
    rotated,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """Heads of some tokens: gradients rotated back; zeros for queries that other ranks take."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    group, head = rows // H, rows % H
    exists = rows < G * H
    is_query = exists & (head >= first_query) & (head < first_query + num_queries)
    is_key, is_value = exists & (head == H - 2), exists & (head == H - 1)
    query = (group * num_queries + head - first_query).to(tl.int64)[:, None]
    group = group.to(tl.int64)[:, None]
    half, i = rotated // 2, tl.arange(0, HALF)
    inside = (i < half)[None, :]
    is_turned, written = (is_query | is_key)[:, None], exists[:, None] & inside
    masks = (is_query[:, None] & inside, is_key[:, None] & inside, is_value[:, None] & inside)
    largest = tl.zeros((ROWS, HALF), tl.int32)

    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for token in range(first, num_tokens, step):
        s, b = token // B, token % B
        of_query = dq_ptr + s * dq_stride_s + b * dq_stride_b + query * dq_stride_n
        of_key = dk_ptr + s * dk_stride_s + b * dk_stride_b + group * dk_stride_g
        of_value = dv_ptr + s * dv_stride_s + b * dv_stride_b + group * dv_stride_g
        target = dqkv_ptr + (token * G * H + rows)[:, None] * D
        cos, sin = _angles(cos_ptr, sin_ptr, token // tokens_of_a_position, rotated, HALF)
        low = _one_of(of_query, of_key, of_value, i, masks)
        high = _one_of(of_query, of_key, of_value, half + i, masks)
        new_low, new_high = _turned(low, high, cos, -sin)
        new_low, new_high = tl.where(is_turned, new_low, low), tl.where(is_turned, new_high, high)
        tl.store(target + i[None, :], new_low, mask=written)
        tl.store(target + half + i[None, :], new_high, mask=written)
        largest = tl.maximum(largest, magnitude(new_low.to(tl.float32)))
        largest = tl.maximum(largest, magnitude(new_high.to(tl.float32)))
        if REST:
            other = rotated + tl.arange(0, REST)
            exist = (other < D)[None, :]
            parts = (is_query[:, None] & exist, is_key[:, None] & exist, is_value[:, None] & exist)
            rest = _one_of(of_query, of_key, of_value, other, parts)
            tl.store(target + other[None, :], rest, mask=exists[:, None] & exist)
            amax_of_rest = tl.max(magnitude(rest.to(tl.float32)), axis=1)
            largest = tl.maximum(largest, amax_of_rest[:, None])
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(amax_ptr + program, tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit
def _angles(cos_ptr, sin_ptr, position, rotated, HALF: tl.constexpr):
    """cos and sin [1, HALF] in fp32."""
    i = tl.arange(0, HALF)
    inside = i < rotated // 2
    cos = tl.load(cos_ptr + position * rotated + i, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + position * rotated + i, mask=inside, other=0.0)
    return cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]


@triton.jit
def _turned(low, high, cos, sin):
    """A pair of features after its rotation, rounded after every product and sum."""
    dtype = low.dtype
    low, high = low.to(tl.float32), high.to(tl.float32)
    new_low = _rounded(low * cos, dtype) - _rounded(high * sin, dtype)
    new_high = _rounded(high * cos, dtype) + _rounded(low * sin, dtype)
    return new_low.to(dtype), new_high.to(dtype)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _one_of(of_query, of_key, of_value, i, masks):
    """Every row from the tensor whose mask it is in; zeros from none."""
    query = tl.load(of_query + i[None, :], mask=masks[0], other=0.0)
    key = tl.load(of_key + i[None, :], mask=masks[1], other=0.0)
    value = tl.load(of_value + i[None, :], mask=masks[2], other=0.0)
    return tl.where(masks[0], query, tl.where(masks[1], key, value))
