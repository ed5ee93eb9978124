"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout of Megatron.

Shapes: S sequence, B micro-batch, N heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def apply_rope(x_SBND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R features of every head by its position; same shape and dtype."""
    rotated = cos.shape[-1]
    x, rest = x_SBND[..., :rotated], x_SBND[..., rotated:]
    low, high = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
