"""Train, valid and test datasets from the config: megatron-core's GPT datasets, or mock data.

Inputs on which megatron-core would assert, loop forever or read a stale cache are checked here
first, on every rank, so that no rank waits at a barrier for one that failed. Megatron-core is
imported where it is used: that takes seconds, which the checks before a start need not wait for.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from fp8lm.data.batches import SizedDataset
from fp8lm.data.boundaries import SeparatedDocuments
from fp8lm.data.checked_dataset import CheckedDataset
from fp8lm.data.indexed import IndexedFile, inspect_indexed
from fp8lm.data.mock import MockDataset
from fp8lm.data.splits import SPLITS, split_edges
from fp8lm.data.token_checks import check_document_ends, check_tokenizer
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.quiet import quiet_megatron

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from fp8lm.config import Config
    from fp8lm.config.storage import DataConfig

Sizes = tuple[int, int, int]
Datasets = tuple[SizedDataset | None, SizedDataset | None, SizedDataset | None]


def build_datasets(config: Config, tokenizer: Tokenizer, sizes: Sizes) -> Datasets:
    """Datasets of at least `sizes` (train, valid, test) samples; None where the size is 0.

    A blend without weights has each file once: of validation samples there may be fewer.

    Items are dicts of `tokens`, `labels` [seq_length] int64 and `loss_mask` [seq_length] fp32, and
    of what `data.reset_position_ids` and `data.reset_attention_mask` add (`SeparatedDocuments`).
    Call it on every rank. A blend with `data.data_cache_path` needs an initialised process group,
    even of one process. Raises `InputError` for missing or damaged files, a tokenizer that did not
    make them, and a split without the documents it needs; so does an item with an id outside the
    vocabulary, which the checks of large files may miss.
    """
    if config.train.objective != "pretrain":
        from fp8lm.data.instruction import build_packed_datasets  # which pretraining does not need

        return build_packed_datasets(config, tokenizer, sizes)
    if config.data.mock_data:
        train, valid, test = (
            _separated(_mock(config, tokenizer, split, size), config.data, tokenizer.eod)
            if size
            else None
            for split, size in enumerate(sizes)
        )
        return train, valid, test
    prefixes, weights = blend_of(config.data.data_path or ())
    files = check_files(config, tokenizer, sizes)
    with quiet_megatron():
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

        gpt_config = GPTDatasetConfig(
            random_seed=config.shuffle_seed,
            sequence_length=config.model.seq_length,
            blend=(prefixes, weights),
            split=_plain_split(config.data.split),
            path_to_cache=config.data.data_cache_path,
            tokenizer=_tokenizer_for(tokenizer, files),
            reset_position_ids=False,  # see `SeparatedDocuments`
            reset_attention_mask=False,
            eod_mask_loss=config.data.eod_mask_loss,
            create_attention_mask=False,
        )
    shares = zip(gpt_config.split_matrix, sizes, strict=True)
    gpt_config.split_matrix = [share if size else None for share, size in shares]
    training, validation, testing = (
        None
        if dataset is None
        else _separated(CheckedDataset(dataset, tokenizer.vocab_size), config.data, tokenizer.eod)
        for dataset in _build(gpt_config, sizes)
    )
    return training, validation, testing


def check_files(config: Config, tokenizer: Tokenizer, sizes: Sizes) -> list[IndexedFile]:
    """The token files that `data.data_path` names, none for mock data and examples of tuning.

    Raises `InputError` for missing or damaged ones, for a tokenizer that did not make them, for
    documents without an end that are to be kept apart, and where `data.split` leaves no documents
    for one of `sizes` (train, valid, test) samples.
    """
    if config.train.objective != "pretrain":
        from fp8lm.data.instruction import build_packed_datasets

        build_packed_datasets(config, tokenizer, sizes)
        return []
    if config.data.mock_data:
        return []
    prefixes, weights = blend_of(config.data.data_path or ())
    files = [inspect_indexed(prefix) for prefix in prefixes]
    tokens = sum(file.num_tokens for file in files)
    for file in files:
        check_tokenizer(file, tokenizer, tokens - file.num_tokens)
        if config.data.reset_position_ids or config.data.reset_attention_mask:
            check_document_ends(file, tokenizer.eod)
    split = _plain_split(config.data.split)
    _check_split(split, files, sizes)
    if weights is None and len(files) > 1:
        _check_single_pass(config, split, files, sizes)
    return files


def blend_of(data_path: Sequence[str | float]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of `[weight, prefix, ...]`, or of `[prefix, ...]`, which has none.

    A weight of 0 leaves its prefix out, files and all.
    """
    if isinstance(data_path[0], str):
        return list(map(str, data_path)), None
    pairs = [
        (prefix, weight)
        for weight, prefix in zip(data_path[::2], data_path[1::2], strict=True)
        if weight
    ]
    prefixes, weights = zip(*pairs, strict=True)
    return list(map(str, prefixes)), list(map(float, weights))


def _plain_split(split: str) -> str:
    """The shares without exponents, which megatron-core would read as two numbers."""
    return ",".join(
        np.format_float_positional(float(share), trim="-") for share in split.split(",")
    )


@dataclass(frozen=True)
class _DatasetTokenizer:
    """What GPTDataset asks of a tokenizer; `unique_identifiers` become part of its cache's name.

    They carry the data's fingerprints too: megatron-core names a cache by the path alone, and
    would read stale sample indices after the data was preprocessed again.
    """

    vocab_size: int
    eod: int
    unique_identifiers: dict


def _tokenizer_for(tokenizer: Tokenizer, files: list[IndexedFile]) -> _DatasetTokenizer:
    identifiers = {**tokenizer.identity, "data": [file.fingerprint for file in files]}
    return _DatasetTokenizer(tokenizer.vocab_size, tokenizer.eod, identifiers)


def _check_split(split: str, files: list[IndexedFile], sizes: Sizes) -> None:
    """`InputError` for a share that wants samples and has no tokens.

    Megatron-core counts epochs until there are tokens enough: without any it never returns.
    """
    for name, share, size in zip(SPLITS, split_edges(split), sizes, strict=True):
        if size == 0:
            continue
        for file in files:
            begin, end = (round(edge * len(file.lengths)) for edge in share)
            if not file.lengths[begin:end].any():
                raise InputError(
                    f"data.split {split!r} leaves no documents of {file.prefix} "
                    f"({len(file.lengths)} documents) for {name}, which wants {size} samples: "
                    "change data.split, or use more documents (preprocess_data.py --split-lines "
                    "makes one of every line)"
                )


def _check_single_pass(config: Config, split: str, files: list[IndexedFile], sizes: Sizes) -> None:
    """`InputError` for a blend without weights that is too small: megatron-core repeats nothing.

    An evaluation needs its own samples only, the next may read them again.
    """
    length = config.model.seq_length
    evaluation = config.train.eval_iters * config.train.global_batch_size
    cure = "give weights, with which files are repeated: [weight1, prefix1, ...]"
    for name, share, size in zip(SPLITS, split_edges(split), sizes, strict=True):
        wanted = size if name == "train" else min(size, evaluation)
        samples = [_samples_once(file, share, length) for file in files]
        for file, count in zip(files, samples, strict=True):
            if size and not count:
                raise InputError(
                    f"data.data_path without weights: {file.prefix} has less than a sample of "
                    f"{length} tokens (model.seq_length) for {name}: leave it out, or {cure}"
                )
        if sum(samples) < wanted:
            raise InputError(
                f"data.data_path without weights takes each file once, {sum(samples)} samples for "
                f"{name}, which wants {wanted}: {cure}"
            )


def _samples_once(file: IndexedFile, share: tuple[float, float], length: int) -> int:
    begin, end = (round(edge * len(file.lengths)) for edge in share)
    return max(0, int(file.lengths[begin:end].sum()) - 1) // length  # the last label is one more


def _build(config: GPTDatasetConfig, sizes: Sizes) -> list[Dataset | None]:
    where = config.path_to_cache or "the folder beside the data"
    try:
        with quiet_megatron():
            from megatron.core.datasets.blended_megatron_dataset_builder import (
                BlendedMegatronDatasetBuilder,
            )
            from megatron.core.datasets.gpt_dataset import GPTDataset

            return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    except (EOFError, ValueError) as err:
        raise InputError(
            f"cannot read the sample indices kept in {where}: {err}: remove that folder, it is "
            "made again"
        ) from err
    except Exception as err:
        # With a process group megatron-core wraps the OSError of an unwritable cache.
        cause = err.__cause__ if isinstance(err.__cause__, OSError) else err
        if not isinstance(cause, OSError) or cause.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise InputError(
            f"cannot keep the sample indices in {where}: {cause}: set data.data_cache_path to a "
            "folder that can be written to"
        ) from err


def _separated(dataset: SizedDataset, data: DataConfig, eod: int) -> SizedDataset:
    if not (data.reset_position_ids or data.reset_attention_mask):
        return dataset
    return SeparatedDocuments(
        dataset,
        eod,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
    )


def _mock(config: Config, tokenizer: Tokenizer, split: int, size: int) -> MockDataset:
    return MockDataset(
        vocab_size=tokenizer.vocab_size,
        seq_length=config.model.seq_length,
        seed=config.shuffle_seed,
        split=split,
        size=size,
        eod=tokenizer.eod,
        eod_mask_loss=config.data.eod_mask_loss,
    )
