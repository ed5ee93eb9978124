"""A micro-batch: the inputs of the model and of its loss.

Shapes: B samples of S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """`tokens`, `labels` [B, S] int64; `loss_mask` [B, S] fp32, the weight of every label's loss.

    `positions` [B, S] int64 are the tokens' positions for embeddings, below the model's
    `max_position_embeddings` (default: 0 .. S - 1 in every sample). `sample_ids` [B] int64 are the
    samples' numbers in the run, from which hidden dropout draws.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor | None = None
    sample_ids: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; copies from pinned memory do not wait."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return Batch(**moved)
