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
    elif config.data.eod_mask_loss:
        yield (
            f"data.eod_mask_loss = true is for text: with train.objective = "
            f"{config.train.objective} answers alone count"
        )
