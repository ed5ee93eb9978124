"""Rotary position embedding (RoFormer, arXiv 2104.09864) of a fused projection, in eager PyTorch.

Half-split, as Megatron has it: features i and i + R/2 of a head are the pair that is rotated.

Shapes: S sequence, B micro-batch, G query groups, N query heads, D head size, R rotated features;
H = N/G + 2 heads of a group in the projection: its queries, its key, its value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_SBND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R features of every head by its position; same shape and dtype."""
    rotated = cos.shape[-1]
    x, rest = x_SBND[..., :rotated], x_SBND[..., rotated:]
    low, high = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def split_and_rotate(
    qkv_SBGHD: Tensor, cos: Tensor, sin: Tensor, queries: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels.rope`."""
    q, k, v = qkv_SBGHD[..., queries, :], qkv_SBGHD[..., -2, :], qkv_SBGHD[..., -1, :]
    return rotate(q.flatten(2, 3), cos, sin), rotate(k, cos, sin), v


def rotate_back_and_join(
    gradients: tuple[Tensor, Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    queries: slice,
    heads_per_group: int,
) -> Tensor:
    """See `Kernels.rope_backward`."""
    dq_SBND, dk_SBGD, dv_SBGD = gradients
    groups, left_out = dk_SBGD.shape[2], heads_per_group - 2 - queries.stop
    dq = rotate(dq_SBND, cos, -sin).unflatten(2, (groups, -1))
    dk = rotate(dk_SBGD, cos, -sin)
    heads = [dq, dk.unsqueeze(3), dv_SBGD.unsqueeze(3)]
    if queries.start:
        heads.insert(0, dq.new_zeros(*dq.shape[:3], queries.start, dq.shape[4]))
    if left_out:
        heads.insert(-2, dq.new_zeros(*dq.shape[:3], left_out, dq.shape[4]))
    return torch.cat(heads, dim=3)
