"""Checks of tuning: keys that need another objective."""

from __future__ import annotations

from collections.abc import Iterator

from fp8lm.config.root import Config


def objective(config: Config) -> Iterator[str]:
    """Keys of section `tuning` are for an objective that reads them, those of text for text."""
    if config.train.objective == "pretrain":
        given = config.tuning.model_dump(exclude_defaults=True)
        for key, value in given.items():
            yield f"tuning.{key} = {value} is for train.objective = sft, and it is pretrain"
        return
    for key in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
        if getattr(config.data, key):
            yield (
                f"data.{key} = true is for text: with train.objective = {config.train.objective} "
                "answers alone count, and examples do not see each other"
            )
