"""The samples of a tuning run: from its config to packed examples, split by split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fp8lm.config import Config
from fp8lm.data.batches import SizedDataset
from fp8lm.data.chat import ChatTemplate
from fp8lm.data.conversations import ExampleEncoder, ExampleFormat
from fp8lm.data.documents import SkippedDocuments
from fp8lm.data.examples import (
    Examples,
    is_json_file,
    open_indexed_examples,
    read_json_examples,
)
from fp8lm.data.mock import mock_examples
from fp8lm.data.packed_examples import PackedExamples, Selection
from fp8lm.data.reference_losses import ReferenceLosses
from fp8lm.data.sidecar import read_sidecar
from fp8lm.data.splits import SPLITS, document_ranges
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.runtime.errors import InputError

FORMATS: dict[str, ExampleFormat] = {"sft": "chat", "dpo": "preference"}  # by objective
Sizes = tuple[int, int, int]
Datasets = tuple[SizedDataset | None, SizedDataset | None, SizedDataset | None]


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
    places, sizes, skipped = [], [], SkippedDocuments(noun="long example")
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
