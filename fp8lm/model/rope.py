"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout of Megatron.

Shapes: see `fp8lm.kernels.rope`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp8lm.kernels.interface import Kernels


def rope_tables(
    seq_length: int, head_size: int, base: float, percent: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [S, 1, 1, R] in fp32 for the first R = percent * head_size features.

    Computed on the CPU, so that they have the same bits on every device.
    """
    rotated = int(head_size * percent) // 2 * 2
    frequency = base ** (-torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    angle = torch.outer(torch.arange(seq_length, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1)[:, None, None, :]
    return angle.cos().to(device), angle.sin().to(device)


def rotated_heads(
    qkv_SBGHD: Tensor, rope: tuple[Tensor, Tensor], queries: slice, kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """q [S,B,N,D] and k [S,B,G,D] rotated by `rope` (cos, sin), and v; see `Kernels.rope`."""
    return _RotatedHeads.apply(qkv_SBGHD, *rope, queries, kernels)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_SBGHD: Tensor, cos: Tensor, sin: Tensor, queries: slice, kernels: Kernels
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.queries, ctx.kernels, ctx.heads_per_group = queries, kernels, qkv_SBGHD.shape[3]
        return kernels.rope(qkv_SBGHD, cos, sin, queries)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        of_heads = ctx.queries, ctx.heads_per_group
        dqkv = ctx.kernels.rope_backward(gradients, *ctx.saved_tensors, *of_heads)
        return dqkv, None, None, None, None
