"""Samples for tuning: examples packed into sequences that a model reads, in a seeded order.

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

from fp8lm.config import Config
from fp8lm.data.batches import SizedDataset
from fp8lm.data.best_fit import pack_best_fit
from fp8lm.data.chat import ChatTemplate
from fp8lm.data.conversations import ExampleEncoder, ExampleFormat, MaskedTokens
from fp8lm.data.documents import SkippedDocuments
from fp8lm.data.examples import (
    Examples,
    is_json_file,
    open_indexed_examples,
    read_json_examples,
)
from fp8lm.data.mock import mock_examples
from fp8lm.data.reference_losses import ReferenceLosses
from fp8lm.data.sidecar import read_sidecar
from fp8lm.data.splits import SPLITS, document_ranges
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.runtime.errors import InputError

FORMATS: dict[str, ExampleFormat] = {"sft": "chat", "dpo": "preference"}  # by objective
LOOKED_AT = 100  # examples
Sizes = tuple[int, int, int]
Datasets = tuple[SizedDataset | None, SizedDataset | None, SizedDataset | None]


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


def build_packed_datasets(config: Config, tokenizer: Tokenizer, sizes: Sizes) -> Datasets:
    """Training, validation and test samples of `train.objective`; None where the size is 0.

    `InputError` for data that cannot be read, examples that do not fit, and empty splits.
    """
    sources = open_sources(config, tokenizer)
    train, valid, test = (
        _build_split(config, tokenizer, sources, split, size) if size else None
        for split, size in enumerate(sizes)
    )
    return train, valid, test


def open_sources(config: Config, tokenizer: Tokenizer) -> list[Examples]:
    """What `data.data_path` names; none for mock data."""
    if config.data.mock_data:
        return []
    form, tuning = FORMATS[config.train.objective], config.tuning
    encoder = ExampleEncoder(tokenizer, chat_template(config, tokenizer), form)
    return [
        read_json_examples(path, encoder, skip_bad=tuning.on_bad_line == "skip")
        if is_json_file(path)
        else open_indexed_examples(path, form, tokenizer)
        for path in map(str, config.data.data_path or ())
    ]


def chat_template(config: Config, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of a run: of its key, else of its preprocessed data, else of its tokenizer.

    `InputError` where data were made with another.
    """
    given = config.tuning.chat_template
    template = None if given is None else ChatTemplate.read(given, tokenizer)
    paths = [] if config.data.mock_data else map(str, config.data.data_path or ())
    for path in paths:
        sidecar = None if is_json_file(path) else read_sidecar(path)
        if sidecar is None or sidecar.chat_template is None:
            continue
        place = f"the chat template of {path}"
        made_with = ChatTemplate.of_source(sidecar.chat_template, tokenizer, place)
        if template is not None and template.source != made_with.source:
            raise InputError(
                f"data.data_path: {path} was made with another chat template than {template.place}"
                ": preprocess again, or leave out tuning.chat_template"
            )
        template = made_with
    return template or ChatTemplate.of(tokenizer)


def _build_split(
    config: Config, tokenizer: Tokenizer, sources: Sequence[Examples], split: int, size: int
) -> PackedExamples:
    length, seed = config.model.seq_length, config.shuffle_seed
    if config.data.mock_data:
        form = FORMATS[config.train.objective]
        ids = tokenizer.vocab_size
        sources = [mock_examples(form, ids, length, seed, split, tokenizer.eod)]
        ranges = [range(sources[0].num_documents)]
    else:
        ranges = [
            document_ranges(config.data.split, source.num_documents)[split] for source in sources
        ]
    chosen = _select(config, sources, ranges)
    if not len(chosen.sizes):
        raise InputError(
            f"data.split {config.data.split!r} leaves no examples for {SPLITS[split]}, which wants "
            f"{size} samples: change data.split, or use more examples"
        )
    losses, path = None, config.tuning.reference_logprobs
    if path is not None:
        losses = ReferenceLosses.read(path).of_split(path, SPLITS[split], chosen.digest())
    samples = PackedExamples(
        chosen,
        seq_length=length,
        pad=tokenizer.eod,
        seed=seed,
        split=split,
        size=size,
        packing=config.tuning.packing,
        reference_losses=losses,
    )
    if split:
        evaluation = config.train.eval_iters * config.train.global_batch_size
        samples.size = max(1, samples.samples_per_epoch // evaluation) * evaluation
    return samples


def _select(config: Config, sources: Sequence[Examples], ranges: Sequence[range]) -> Selection:
    """The documents `ranges` of `sources`; those that are too long end the run, or are left out."""
    places, sizes, skipped = [], [], SkippedDocuments()
    most = config.model.seq_length
    for number, (source, documents) in enumerate(zip(sources, ranges, strict=True)):
        for document in documents:
            size = int(source.sizes[document])
            if size <= most:
                places.append((number, document))
                sizes.append(size)
                continue
            fault = (
                f"{source.place(document)}: {size} tokens{_of_both(source)}, and a sample has "
                f"{most} (model.seq_length)"
            )
            if config.tuning.on_long_example == "error":
                raise InputError(f"{fault}: leave out such with tuning.on_long_example=skip")
            skipped.add(fault)
    return Selection(sources, np.array(places).reshape(-1, 2), np.array(sizes), skipped)


def _of_both(source: Examples) -> str:
    return " of chosen and rejected together" if source.per_document > 1 else ""
