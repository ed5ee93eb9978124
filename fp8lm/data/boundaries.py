"""Documents of a sample apart: Megatron's --reset-position-ids and --reset-attention-mask.

A sample is S tokens of a stream of documents, each of which ends with the end-of-document token
(EOD). The token after an EOD begins a document; so does the first of a sample, which may lie in the
middle of one. The EOD belongs to the document that it ends: several in a row are documents of one
token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8lm.data.batches import SizedDataset


def document_starts(tokens_S: Tensor, eod: int) -> Tensor:
    """Of every token the place of its document's first one, int64 [S] (see `Documents`)."""
    places = torch.arange(len(tokens_S))
    begins = torch.zeros_like(places)
    begins[1:] = places[1:] * (tokens_S[:-1] == eod)
    return begins.cummax(0).values


class SeparatedDocuments(SizedDataset):
    """The items of `dataset`, with `position_ids` or `document_starts` [S] int64, or both.

    `reset_position_ids`: positions count from 0 in every document. `reset_attention_mask`: tokens
    attend within their document only. Neither implies the other, as in Megatron.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        eod: int,
        *,
        reset_position_ids: bool,
        reset_attention_mask: bool,
    ) -> None:
        self.dataset, self.eod = dataset, eod
        self.reset_position_ids = reset_position_ids
        self.reset_attention_mask = reset_attention_mask

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.dataset[index]
        starts = document_starts(item["tokens"], self.eod)
        if self.reset_position_ids:
            item = {**item, "position_ids": torch.arange(len(starts)) - starts}
        if self.reset_attention_mask:
            item = {**item, "document_starts": starts}
        return item
