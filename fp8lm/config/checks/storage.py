"""Checks of data, tokenizer and checkpoint keys."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fp8lm.config.root import Config


def data(config: Config) -> Iterator[str]:
    """There is one source of data, well written."""
    data = config.data
    if data.mock_data and data.data_path:
        yield f"data.mock_data = true reads no files: drop data.data_path = {list(data.data_path)}"
    if not data.mock_data and not data.data_path:
        yield "no data: set data.data_path=[PREFIX] or data.mock_data=true"
    if data.data_path and config.train.objective == "pretrain":
        yield from _blend(data.data_path)
    elif any(not isinstance(entry, str) for entry in data.data_path or ()):
        yield (
            f"data.data_path = {list(data.data_path or ())}: train.objective = "
            f"{config.train.objective} reads every example once an epoch: drop the weights"
        )
    if not _is_split(data.split):
        yield (
            f'data.split = "{data.split}": expected up to three shares for training, validation '
            'and test, none negative and the first positive, as in "99,1,0"'
        )


def documents(config: Config) -> Iterator[str]:
    """Where documents are kept apart there are positions to restart, and a kernel for attention."""
    model, data = config.model, config.data
    if data.reset_position_ids and model.position_embedding_type == "none":
        yield (
            "data.reset_position_ids = true restarts positions, and "
            "model.position_embedding_type = none has none: drop it"
        )
    if config.separates_documents and model.attention_dropout and config.train.device != "cpu":
        key = "data.reset_attention_mask" if data.reset_attention_mask else "tuning.packing"
        yield (
            f"{key} = true with model.attention_dropout = "
            f"{model.attention_dropout:g}: the kernels that keep documents apart on a GPU have no "
            "dropout; set model.attention_dropout=0, or train.device=cpu"
        )


def _blend(data_path: tuple[float | str, ...]) -> Iterator[str]:
    given = f"data.data_path = {list(data_path)}"
    texts = [item for item in data_path if isinstance(item, str)]
    if len(texts) == len(data_path):
        if any(_is_number(prefix) for prefix in texts):
            yield f"{given}: write weights as numbers, without quotes"
        return
    prefixes = data_path[1::2]
    weights = [weight for weight in data_path[0::2] if not isinstance(weight, str)]
    if (
        len(weights) != len(prefixes)
        or len(data_path) % 2 == 1
        or not all(isinstance(prefix, str) for prefix in prefixes)
    ):
        yield (
            f"{given}: expected [prefix], [weight1, prefix1, weight2, prefix2, ...] or "
            "[prefix1, prefix2, ...]"
        )
    elif not any(weights):
        yield f"{given}: a weight of 0 leaves a prefix out, and all are left out"
    elif not math.isfinite(sum(weights)):
        yield f"{given}: the sum of the weights is no finite number: make them smaller"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_split(split: str) -> bool:
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        return False
    # Comparisons with NaN are false, so it fails here like a negative share.
    in_range = all(0 <= share < float("inf") for share in shares)
    return len(shares) <= 3 and in_range and shares[0] > 0


def tokenizer(config: Config) -> Iterator[str]:
    """A tokenizer has its model or its size, whichever its type needs."""
    tokenizer = config.tokenizer
    kind = f"tokenizer.tokenizer_type = {tokenizer.tokenizer_type}"
    if tokenizer.tokenizer_type == "NullTokenizer":
        if tokenizer.vocab_size is None:
            yield f"{kind} needs tokenizer.vocab_size"
        if tokenizer.tokenizer_model is not None:
            yield f"{kind} has no tokenizer.tokenizer_model: drop {tokenizer.tokenizer_model}"
        return
    if tokenizer.tokenizer_model is None:
        yield f"{kind} needs tokenizer.tokenizer_model, its file or folder"
    if tokenizer.vocab_size is not None:
        yield f"{kind} knows its size: drop tokenizer.vocab_size = {tokenizer.vocab_size}"


def checkpoint(config: Config) -> Iterator[str]:
    """What is saved has a folder, and a rollback something to go back to."""
    checkpoint = config.checkpoint
    if checkpoint.save_interval is not None and checkpoint.save is None:
        yield (
            f"checkpoint.save_interval = {checkpoint.save_interval} needs checkpoint.save, "
            "the folder to save to"
        )
    train, threshold = config.train, config.train.loss_spike_threshold
    if threshold is None:
        return
    if checkpoint.save is None or checkpoint.save_interval is None:
        yield (
            f"train.loss_spike_threshold = {threshold} needs checkpoint.save and "
            "checkpoint.save_interval: a run rolls back to a checkpoint"
        )
    kept = checkpoint.keep_last or (1 if checkpoint.save_retain_interval else None)
    interval = checkpoint.save_interval or math.inf
    of_the_spike = math.ceil((train.loss_spike_patience - 1) / interval)
    if kept is not None and kept <= of_the_spike:
        yield (
            f"train.loss_spike_threshold = {threshold} needs checkpoint.keep_last of "
            f"{of_the_spike + 1} or more: the last {of_the_spike} may be of the "
            f"{train.loss_spike_patience} steps of the spike"
        )
