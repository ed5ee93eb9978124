"""The last check of token ids, on the CPU, when a sample is loaded.

Without it an id beyond the vocabulary is an IndexError on one process, and under tensor
parallelism, where every rank has a part of the table, an embedding of zeros and no error at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp8lm.data.batches import SizedDataset
from fp8lm.runtime.errors import InputError

if TYPE_CHECKING:
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset


class CheckedDataset(SizedDataset):
    """A dataset of megatron-core whose samples hold ids from 0 to `vocab_size` - 1 only.

    Any other id raises `InputError`, which names it, its sample and its document. Megatron's
    `position_ids`, which always count from 0 to the end, are left out.
    """

    def __init__(self, dataset: GPTDataset | BlendedDataset, vocab_size: int) -> None:
        self.dataset, self.vocab_size = dataset, vocab_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.dataset[index]
        sample = {field: item[field] for field in ("tokens", "labels", "loss_mask")}
        for field in ("tokens", "labels"):
            low, high = sample[field].aminmax()
            if low < 0 or high >= self.vocab_size:
                self._refuse(index, int(low if low < 0 else high))
        return sample

    def _refuse(self, index: int, token: int) -> None:
        place = _place(self.dataset, index, token)
        raise InputError(
            f"sample {index} holds token id {token}{place}, outside the tokenizer's vocabulary of "
            f"{self.vocab_size}: use the tokenizer that made the data, or preprocess again"
        )


def _place(dataset: GPTDataset | BlendedDataset, index: int, token: int) -> str:
    """The document of a sample that holds an id."""
    if hasattr(dataset, "dataset_sample_index"):  # a blend
        part = dataset.datasets[dataset.dataset_index[index]]
        return _place(part, dataset.dataset_sample_index[index], token)
    shuffled = dataset.shuffle_index[index]
    first, last = dataset.sample_index[shuffled][0], dataset.sample_index[shuffled + 1][0]
    for document in dataset.document_index[first : last + 1]:
        if (dataset.dataset.get(document) == token).any():
            return f" in document {document} (from 0) of {dataset.dataset_path}"
    return ""
