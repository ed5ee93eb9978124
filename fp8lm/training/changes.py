"""What a config changes of the run that it resumes: never silently, and not what weights mean."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fp8lm.errors import InputError

# What else the sections hold, and the other sections, does not decide what is learned.
_SECTIONS = ("model", "precision", "optimizer", "scheduler", "tokenizer")
_KEYS = {
    "train": ("seed", "global_batch_size", "rampup_batch_size", "train_iters", "train_samples"),
    "data": ("data_path", "split", "mock_data", "eod_mask_loss"),
}
# Tensors of the same names and shapes would be read as something else.
_MEANING = (
    "num_attention_heads",
    "num_query_groups",
    "position_embedding_type",
    "rotary_percent",
    "normalization",
)


def check_same_model(former: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> None:
    """Raise `InputError` if the weights of `former` mean something else in `config`."""
    keys = {f"model.{key}" for key in _MEANING}
    if changed := [line for line in changed_keys(former, config) if line.split(" = ")[0] in keys]:
        raise InputError(f"{folder} is a checkpoint from another model: {', '.join(changed)}")


def changed_keys(former: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """`section.key = value (was former)` of what differs; both as `Config.model_dump(mode="json")`.

    A key that one of them does not know is passed over: it is of another version.
    """
    return [
        f"{key} = {json.dumps(value)} (was {json.dumps(was)})"
        for key, was, value in _common(former, config)
        if was != value
    ]


def _common(former: Mapping, config: Mapping) -> Iterator[tuple[str, Any, Any]]:
    for section in (*_SECTIONS, *_KEYS):
        before, now = former.get(section, {}), config[section]
        for key in _KEYS.get(section, now):
            if key in before and key in now:
                yield f"{section}.{key}", before[key], now[key]
