"""What a config changes of the run that it resumes: allowed, but never silently."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

# What else the sections hold, and the other sections, does not decide what is learned.
_SECTIONS = ("model", "precision", "optimizer", "scheduler", "tokenizer")
_KEYS = {
    "train": ("seed", "global_batch_size", "rampup_batch_size", "train_iters", "train_samples"),
    "data": ("data_path", "split", "mock_data", "eod_mask_loss"),
}


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
