"""Checks of the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator

from fp8lm.config.root import Config


def learning_rate(config: Config) -> Iterator[str]:
    """No rate is above the peak."""
    lr = config.optimizer.lr
    for name, value in (
        ("optimizer.min_lr", config.optimizer.min_lr),
        ("scheduler.lr_warmup_init", config.scheduler.lr_warmup_init),
    ):
        if value > lr:
            yield f"{name} = {value:g} is greater than optimizer.lr = {lr:g}"


def schedule(config: Config) -> Iterator[str]:
    """Lengths are in the run's unit, and the warm-up ends before the decay."""
    train, scheduler = config.train, config.scheduler
    if (train.train_iters is None) == (train.train_samples is None):
        return
    unit, other = _units(config)
    for kind in ("decay", "warmup", "wsd_decay"):
        if length := getattr(scheduler, f"lr_{kind}_{other}"):
            yield (
                f"scheduler.lr_{kind}_{other} = {length} does not fit a run measured in "
                f"train.train_{unit}: use scheduler.lr_{kind}_{unit}"
            )
    warmup = getattr(scheduler, f"lr_warmup_{unit}")
    if scheduler.lr_warmup_fraction is not None and warmup:
        yield (
            f"give scheduler.lr_warmup_fraction = {scheduler.lr_warmup_fraction:g} or "
            f"scheduler.lr_warmup_{unit} = {warmup}, not both"
        )
    if warmup >= _decay_length(config):
        yield (
            f"scheduler.lr_warmup_{unit} = {warmup} must be less than the decay's "
            f"{_decay_length(config)} (scheduler.lr_decay_{unit}, else train.train_{unit}): set it "
            "lower"
        )


def wsd(config: Config) -> Iterator[str]:
    """WSD has a final decay, which fits; other styles have none."""
    train, scheduler = config.train, config.scheduler
    unit, _ = _units(config)
    name = f"scheduler.lr_wsd_decay_{unit}"
    length = getattr(scheduler, f"lr_wsd_decay_{unit}")
    if scheduler.lr_decay_style != "WSD":
        if length is not None:
            style = scheduler.lr_decay_style
            yield f"{name} = {length} needs scheduler.lr_decay_style = WSD, not {style}"
    elif length is None:
        yield f"scheduler.lr_decay_style = WSD needs {name}, the length of its final decay"
    elif getattr(train, f"train_{unit}") is not None:
        decay = _decay_length(config)
        if length + getattr(scheduler, f"lr_warmup_{unit}") > decay:
            yield f"{name} = {length} and the warm-up are longer than the schedule's {decay}"


def _units(config: Config) -> tuple[str, str]:
    by_samples = config.train.train_samples is not None
    return ("samples", "iters") if by_samples else ("iters", "samples")


def _decay_length(config: Config) -> int:
    unit, _ = _units(config)
    decay = getattr(config.scheduler, f"lr_decay_{unit}")
    return decay or getattr(config.train, f"train_{unit}")
