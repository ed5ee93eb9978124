"""A micro-batch: the inputs of the model and of its loss.

Shapes: B samples of S tokens, D documents in all of them together.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Where documents begin in a micro-batch whose tokens attend within their document only.

    `starts` [B, S] int64 is of every token the place in its sample of its document's first one:
    token t sees tokens starts[t] .. t. For kernels of variable length the samples lie one after the
    other: `cu_seqlens` [D + 1] int32 are the documents' bounds in B S tokens, `max_seqlen` is the
    length of the longest. A document never spans samples.
    """

    starts: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def from_starts(cls, starts_BS: Tensor) -> Documents:
        """Derive the bounds, on the host: `starts_BS` is on the CPU."""
        places = torch.arange(starts_BS.shape[1])
        first_tokens = (starts_BS == places).flatten().nonzero().squeeze(1)
        end = first_tokens.new_full((1,), starts_BS.numel())
        bounds = torch.cat((first_tokens, end))
        return cls(starts_BS, bounds.int(), int(bounds.diff().max()))

    @property
    def is_one_per_sample(self) -> bool:
        """Whether nothing is apart: plain causal attention computes the same."""
        return len(self.cu_seqlens) == len(self.starts) + 1

    def to(self, device: torch.device) -> Documents:
        """The same on `device`; copies from pinned memory do not wait."""
        starts, cu_seqlens = (
            x.to(device, non_blocking=True) for x in (self.starts, self.cu_seqlens)
        )
        return Documents(starts, cu_seqlens, self.max_seqlen)


@dataclass(frozen=True, eq=False)
class Batch:
    """`tokens`, `labels` [B, S] int64; `loss_mask` [B, S] fp32, the weight of every label's loss.

    `position_ids` [B, S] int64 are the tokens' positions for embeddings, below the model's
    `max_position_embeddings` (default: 0 .. S - 1 in every sample). `sample_ids` [B] int64 are the
    samples' numbers in the run, from which hidden dropout draws. `documents` keeps those of a
    sample apart in attention (default: every sample is one). Every rank of a replica reads the
    whole micro-batch from its own data, on every pipeline stage: nothing of it is communicated.

    Of preferences: `sequence_bounds` [B, 2 P + 1] int64 are where in a sample its sequences begin
    and end, the chosen and the rejected answer of up to P pairs in turn (pairs that are not there
    are empty). `reference_losses` [B, S] fp32 are -log p of every label by the reference model, of
    answers at least; only the last pipeline stage has them.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor | None = None
    sample_ids: Tensor | None = None
    documents: Documents | None = None
    sequence_bounds: Tensor | None = None
    reference_losses: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; copies from pinned memory do not wait."""
        documents = None if self.documents is None else self.documents.to(device)
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return Batch(**moved, documents=documents)
