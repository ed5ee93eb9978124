"""How layers of a config (base file, file, command line) combine: the later layer wins, key by key.

Three rules go beyond that, so that a choice made in a later layer need not undo the earlier one:
a key replaces its alternatives (`train_samples` over a base with `train_iters`), another preset
drops what the earlier preset had filled in, another tokenizer drops the earlier one's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from fp8lm.config.precision import PRESETS

Layer = dict[str, Any]

ALTERNATIVES = (
    ("train", ("train_iters", "train_samples")),
    ("scheduler", ("lr_decay_iters", "lr_decay_samples")),
    ("scheduler", ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction")),
    ("scheduler", ("lr_wsd_decay_iters", "lr_wsd_decay_samples")),
    ("data", ("mock_data", "data_path")),
)


def merge(lower: Layer, upper: Layer) -> Layer:
    """Return `lower` overlaid with `upper`; neither is changed."""
    lower = deepcopy(lower)
    # A section without keys, which YAML reads as null, says nothing.
    upper = {k: v for k, v in upper.items() if v is not None or not _section(lower, k)}
    _drop_alternatives(lower, upper)
    _drop_preset_values(_section(lower, "precision"), _section(upper, "precision"))
    _drop_other_tokenizer(_section(lower, "tokenizer"), _section(upper, "tokenizer"))
    return _overlay(lower, deepcopy(upper))


def _overlay(lower: Layer, upper: Layer) -> Layer:
    for key, value in upper.items():
        both = isinstance(value, dict) and isinstance(lower.get(key), dict)
        lower[key] = _overlay(lower[key], value) if both else value
    return lower


def _drop_alternatives(lower: Layer, upper: Layer) -> None:
    for section, names in ALTERNATIVES:
        chosen = [name for name in names if _is_choice(_section(upper, section).get(name))]
        if chosen:
            for name in set(names) - set(chosen):
                _section(lower, section).pop(name, None)


def _drop_preset_values(lower: Layer, upper: Layer) -> None:
    before, after = lower.get("preset"), upper.get("preset")
    if after is None or before == after or not isinstance(before, str):
        return
    _drop_equal(lower, PRESETS.get(before, {}))


def _drop_equal(lower: Layer, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _drop_equal(_section(lower, key), value)
        elif lower.get(key) == value:
            del lower[key]


def _drop_other_tokenizer(lower: Layer, upper: Layer) -> None:
    kind = upper.get("tokenizer_type")
    if kind is not None and kind != lower.get("tokenizer_type"):
        lower.pop("tokenizer_model", None)
        lower.pop("vocab_size", None)


def _section(layer: Layer, name: str) -> Layer:
    section = layer.get(name)
    return section if isinstance(section, dict) else {}


def _is_choice(value: Any) -> bool:
    # Zero is a choice (no warm-up), so truth alone does not decide.
    return value is not None and value is not False and value != []
