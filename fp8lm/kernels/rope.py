"""Rotary position embedding (RoFormer, arXiv 2104.09864) of a fused projection, in eager PyTorch.

Half-split, as Megatron has it: features i and i + R/2 of a head are the pair that is rotated.

Shapes: S sequence, B micro-batch, G query groups, N query heads, D head size, R rotated features;
H = N/G + 2 heads of a group in the projection: its queries, its key, its value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate the first R features of every head by its position; same shape and dtype.

    x: [S,B,...,D]. cos, sin: [S,1,...,R] or [S,B,1,...,R], of as many dimensions. `out` is what is
    written, if given.
    """
    out = torch.empty_like(x) if out is None else out
    rotated = cos.shape[-1]
    low, high = x[..., :rotated].chunk(2, dim=-1)
    sin_of_low, sin_of_high = sin.chunk(2, dim=-1)
    turned = out[..., :rotated]
    turned_low, turned_high = torch.mul(x[..., :rotated], cos, out=turned).chunk(2, dim=-1)
    turned_low.sub_(high * sin_of_low)
    turned_high.add_(low * sin_of_high)
    if rotated < x.shape[-1]:
        out[..., rotated:] = x[..., rotated:]
    return out


def split_and_rotate(
    qkv_SBGHD: Tensor, cos: Tensor, sin: Tensor, queries: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels.rope`."""
    q, k, v = qkv_SBGHD[..., queries, :], qkv_SBGHD[..., -2, :], qkv_SBGHD[..., -1, :]
    return rotate(q, cos.unsqueeze(2), sin.unsqueeze(2)).flatten(2, 3), rotate(k, cos, sin), v


def rotate_back_and_join(
    gradients: tuple[Tensor, Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    queries: slice,
    heads_per_group: int,
) -> Tensor:
    """See `Kernels.rope_backward`."""
    dq_SBND, dk_SBGD, dv_SBGD = gradients
    seq, batch, groups, size = dk_SBGD.shape
    joined = dk_SBGD.new_empty(seq, batch, groups, heads_per_group, size)
    if queries.stop - queries.start < heads_per_group - 2:
        joined.zero_()  # of the queries that are left out
    back = -sin
    dq = dq_SBND.unflatten(2, (groups, -1))
    rotate(dq, cos.unsqueeze(2), back.unsqueeze(2), out=joined[..., queries, :])
    rotate(dk_SBGD, cos, back, out=joined[..., -2, :])
    joined[..., -1, :] = dv_SBGD
    return joined
