"""Examples packed into sequences that a model reads, in a seeded order.

    tokens      x_0 x_1 x_2 | y_0 y_1 | padding         labels      x_1 x_2 x_3 | y_1 y_2 | padding
    positions    0   1   2     0   1     0   1          loss mask   of labels that are answers

A sample is whole examples, packed once (see `best_fit`); an epoch reads every sample once, in an
order of its own. Of held-out data each sample counts once in an evaluation: one that is larger
reads padding after them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain

import numpy as np
import torch

from fp8lm.data.batches import SizedDataset
from fp8lm.data.best_fit import pack_best_fit
from fp8lm.data.conversations import MaskedTokens
from fp8lm.data.documents import SkippedDocuments
from fp8lm.data.examples import Examples
from fp8lm.data.splits import SPLITS

LOOKED_AT = 100  # examples


@dataclass(frozen=True)
class Selection:
    """Documents of several sources, in order, all no longer than a sample; `skipped` are longer."""

    sources: Sequence[Examples]
    places: np.ndarray  # [documents, 2]: source, document
    sizes: np.ndarray  # tokens of each
    skipped: SkippedDocuments = field(default_factory=SkippedDocuments)

    @property
    def per_document(self) -> int:
        """Sequences of a document."""
        return self.sources[0].per_document

    @cached_property
    def ends(self) -> np.ndarray:
        """The number of labels up to the end of each document."""
        return np.cumsum(self.sizes, dtype=np.int64)

    def sequences(self, document: int) -> list[MaskedTokens]:
        """The sequences of a document."""
        source, number = self.places[document]
        return self.sources[source].sequences(int(number))

    def digest(self) -> str:
        """SHA-256 of all tokens and masks, in their order."""
        digest = hashlib.sha256()
        for document in range(len(self.sizes)):
            for ids, mask in self.sequences(document):
                digest.update(ids.astype(np.int64).data)
                digest.update(mask.data)
        return digest.hexdigest()


class PackedExamples(SizedDataset):
    """`size` samples of `seq_length` tokens, packed from `chosen`; of `split` (0: training).

    Items are those of `BatchIterator`. With `packing` off a sample has one example, and needs no
    documents. `reference_losses` are those of all labels, where a file has them.
    """

    def __init__(
        self,
        chosen: Selection,
        *,
        seq_length: int,
        pad: int,
        seed: int,
        split: int,
        size: int,
        packing: bool = True,
        reference_losses: np.ndarray | None = None,
    ) -> None:
        self.chosen, self.seq_length, self.pad = chosen, seq_length, pad  # the end of document
        self.seed, self.split, self.packing = seed, split, packing
        numbers = range(len(chosen.sizes))
        self.samples = (
            pack_best_fit(chosen.sizes.tolist(), seq_length)
            if packing
            else [[number] for number in numbers]
        )
        self.size, self.reference_losses = size, reference_losses
        self.most_documents = max(map(len, self.samples))

    @property
    def samples_per_epoch(self) -> int:
        """Samples that hold every example once."""
        return len(self.samples)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        epoch, number = divmod(index, len(self.samples))
        if self.split and epoch:
            return self._item(None)
        return self._item(int(self._order(epoch)[number]))

    def once(self, multiple: int) -> PackedExamples:
        """All samples as they were packed, and empty ones up to a `multiple`."""
        other = copy(self)
        other.split, other.size = self.split or 1, -(-len(self.samples) // multiple) * multiple
        return other

    def label_ranges(self, number: int) -> Iterator[tuple[slice, slice]]:
        """Of the documents of sample `number`: their labels in it, and among all labels."""
        begin = 0
        for document in self.samples[number]:
            size, end = int(self.chosen.sizes[document]), int(self.chosen.ends[document])
            yield slice(begin, begin + size), slice(end - size, end)
            begin += size

    def describe(self) -> str:
        """How the examples fill the samples."""
        tokens = int(self.chosen.sizes.sum())
        share = 1 - tokens / (len(self.samples) * self.seq_length)
        packed = f"{len(self.samples):,} samples of {self.seq_length}, {share:.1%} padding"
        left_out = (self.chosen.skipped, *(source.skipped for source in self.chosen.sources))
        skipped = "".join(f"; {each}" for each in left_out if each.count)
        return (
            f"{SPLITS[self.split]}: {len(self.chosen.sizes):,} examples of {tokens:,} tokens in "
            f"{packed}{skipped}"
        )

    def warnings(self) -> list[str]:
        """What is wrong with the first examples, though they can be trained on."""
        first = range(min(LOOKED_AT, len(self.chosen.sizes)))
        sequences = chain.from_iterable(map(self.chosen.sequences, first))
        ends = {int(ids[mask.astype(bool)][-1]) for ids, mask in sequences}
        if self.pad in ends:
            return []
        return [
            f"no answer ends with the end-of-document token (id {self.pad}), at which generation "
            "stops: let the chat template write eos_token after every answer"
        ]

    def _order(self, epoch: int) -> np.ndarray:
        return _permutation(len(self.samples), self.seed, epoch, self.split)

    def _item(self, sample: int | None) -> dict[str, torch.Tensor]:
        """A sample; None is one without examples."""
        documents = [] if sample is None else self.samples[sample]
        shape = self.seq_length
        tokens, labels = np.full((2, shape), self.pad, np.int64)
        mask, positions = np.zeros(shape, np.float32), np.arange(shape)
        begin, bounds = 0, [0]
        for sequence in chain.from_iterable(map(self.chosen.sequences, documents)):
            end = begin + len(sequence.ids) - 1
            tokens[begin:end], labels[begin:end] = sequence.ids[:-1], sequence.ids[1:]
            mask[begin:end] = sequence.mask[1:]
            positions[begin:end] = np.arange(end - begin)
            begin = end
            bounds.append(end)
        item = {"tokens": tokens, "labels": labels, "loss_mask": mask}
        if self.packing:
            positions[begin:] = np.arange(shape - begin)
            item |= {"position_ids": positions, "document_starts": np.arange(shape) - positions}
        if self.chosen.per_document > 1:
            count = self.chosen.per_document * self.most_documents + 1
            item["sequence_bounds"] = np.array(bounds + [begin] * (count - len(bounds)))
        if self.reference_losses is not None:
            reference = np.zeros(shape, np.float32)
            for own, among_all in () if sample is None else self.label_ranges(sample):
                reference[own] = self.reference_losses[among_all]
            item["reference_losses"] = reference
        return {name: torch.from_numpy(value) for name, value in item.items()}


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int, split: int) -> np.ndarray:
    """The order of an epoch; held-out samples keep theirs."""
    if split:
        return np.arange(count)
    return np.random.default_rng((seed, epoch)).permutation(count)
