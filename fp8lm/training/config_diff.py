"""Differences between a config and the one of the run that it resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8lm.runtime.errors import InputError

LONGEST = 1000  # characters of a value that a checkpoint names
# Other keys and sections do not change what is learned.
_SECTIONS = ("model", "precision", "optimizer", "scheduler", "tokenizer", "tuning")
_KEYS = {
    "train": (
        "objective",
        "seed",
        "global_batch_size",
        "rampup_batch_size",
        "train_iters",
        "train_samples",
        "calculate_per_token_loss",
    ),
    "data": (
        "data_path",
        "split",
        "shuffle_seed",
        "mock_data",
        "eod_mask_loss",
        "reset_position_ids",
        "reset_attention_mask",
    ),
}
_HOW = ("cache_weight_operands", "kernels")  # something is computed, and not what
# Tensors of the same names and shapes would be read as something else.
_MEANING = (
    "num_attention_heads",
    "num_query_groups",
    "position_embedding_type",
    "rotary_percent",
    "normalization",
    "use_parallel_residual",
)
_BEFORE = {"use_parallel_residual": False}  # where a checkpoint is older than the key


def check_same_model(former: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> None:
    """Raise `InputError` if the weights of `former` mean something else in `config`."""
    keys = {f"model.{key}" for key in _MEANING}
    former = {**former, "model": _BEFORE | former.get("model", {})}
    if changed := [line for line in changed_keys(former, config) if line.split(" = ")[0] in keys]:
        raise InputError(f"{folder} is a checkpoint from another model: {', '.join(changed)}")


def check_same_objective(
    former: Mapping[str, Any], config: Mapping[str, Any], folder: Path
) -> None:
    """Raise `InputError` where a run of another objective would go on: its data are others."""
    was = former.get("train", {}).get("objective", "pretrain")
    if was != (now := config["train"]["objective"]):
        raise InputError(
            f"{folder} is of a run with train.objective = {was}, and now it is {now}: start from "
            f"its weights with checkpoint.pretrained={folder.parent} in place of checkpoint.load"
        )


def changed_keys(former: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """`section.key = value (was former)` per difference; both as `Config.model_dump(mode="json")`.

    Keys that only one of them has are ignored: they are of another version.
    """
    keys = {section: tuple(config[section]) for section in _SECTIONS} | _KEYS
    keys["precision"] = tuple(key for key in keys["precision"] if key not in _HOW)
    return _changed(keys, former, config)


def changed_layout(former: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """As `changed_keys`, for section `parallel` only.

    Any layout loads under any other; if a load fails all the same, a change may explain why.
    """
    return _changed({"parallel": tuple(config["parallel"])}, former, config)


def _changed(keys: Mapping[str, tuple[str, ...]], former: Mapping, config: Mapping) -> list[str]:
    return [
        f"{section}.{key} = {json.dumps(now[key])} (was {json.dumps(before[key])[:LONGEST]})"
        for section, names in keys.items()
        for before, now in [(former.get(section, {}), config[section])]
        for key in names
        if key in before and key in now and before[key] != now[key]
    ]
