"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout of Megatron.

Llama 3.1's scaling by a factor s, of a pair of channels that turns r times in 8192 tokens:

    r >= 4         theta                        short wavelengths are kept
    r <= 1         theta / s                    long ones stretched
    1 < r < 4      (1 - w) theta / s + w theta  w = (r - 1) / 3

Shapes: see `fp8lm.kernels.rope`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp8lm.kernels.interface import Kernels

# Llama 3.1's, which Megatron has as constants, too.
ORIGINAL_LENGTH, LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 8192, 1.0, 4.0


def rope_tables(
    seq_length: int,
    head_size: int,
    base: float,
    percent: float,
    device: torch.device,
    scaling_factor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin [S, 1, 1, R] in fp32 for the first R = percent * head_size features.

    Computed on the CPU, so that they have the same bits on every device. `scaling_factor`: see the
    module.
    """
    rotated = int(head_size * percent) // 2 * 2
    frequency = base ** (-torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    if scaling_factor is not None:
        frequency = _scaled(frequency, scaling_factor)
    angle = torch.outer(torch.arange(seq_length, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1)[:, None, None, :]
    return angle.cos().to(device), angle.sin().to(device)


def _scaled(frequency: Tensor, factor: float) -> Tensor:
    turns = ORIGINAL_LENGTH * frequency / (2 * math.pi)
    kept = (turns - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequency / factor + kept * frequency


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
