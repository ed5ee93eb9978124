"""Checks of tuning: keys that need another objective."""

from __future__ import annotations

from collections.abc import Iterator

from fp8lm.config.root import Config

PREFERENCE = (
    *("beta", "loss_type", "label_smoothing", "length_normalized"),
    *("sft_loss_weight", "reference_logprobs"),
)


def objective(config: Config) -> Iterator[str]:
    """Keys of section `tuning` are for an objective that reads them, those of text for text."""
    objective, given = config.train.objective, config.tuning.model_dump(exclude_defaults=True)
    for key, value in given.items():
        wanted = "dpo" if key in PREFERENCE else "sft or dpo"
        if objective not in wanted:
            yield f"tuning.{key} = {value} is for train.objective = {wanted}, not {objective}"
    if objective == "pretrain":
        return
    for key in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
        if getattr(config.data, key):
            yield (
                f"data.{key} = true is for text: with train.objective = {objective} answers alone "
                "count, and examples do not see each other"
            )


def preferences(config: Config) -> Iterator[str]:
    """Both answers of a pair are in one sample, and every pair counts the same."""
    tuning = config.tuning
    if config.train.objective != "dpo":
        return
    if not tuning.packing:
        yield (
            "tuning.packing = false separates the answers of a pair, which train.objective = dpo "
            "reads from one sample: leave it out"
        )
    if not config.train.calculate_per_token_loss:
        yield (
            "train.calculate_per_token_loss = false averages over micro-batches, and with "
            "train.objective = dpo every pair counts the same: leave it out"
        )
    if tuning.label_smoothing and tuning.loss_type != "sigmoid":
        yield (
            f"tuning.label_smoothing = {tuning.label_smoothing} is for tuning.loss_type = sigmoid, "
            f"not {tuning.loss_type}"
        )
