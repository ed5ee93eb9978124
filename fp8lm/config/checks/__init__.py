"""Combinations of keys that are each valid but impossible together, section by section.

A check yields a sentence for each: which keys, their values, what would be valid.
"""

from __future__ import annotations

from fp8lm.config.checks import (
    model,
    parallel,
    precision,
    schedule,
    storage,
    telemetry,
    training,
    tuning,
)
from fp8lm.config.root import Config

_CHECKS = (
    model.heads,
    model.positions,
    training.batches,
    training.rampup,
    training.tasks,
    training.cuda_graphs,
    training.length,
    training.seed,
    schedule.learning_rate,
    schedule.schedule,
    schedule.wsd,
    storage.data,
    storage.documents,
    storage.tokenizer,
    storage.checkpoint,
    tuning.objective,
    tuning.preferences,
    precision.formats,
    precision.fp8_gemms,
    precision.block_scales,
    precision.scaling,
    parallel.tensor_parallel,
    parallel.replicas,
    precision.params_wire,
    precision.grad_reduce,
    parallel.pipeline,
    telemetry.statistics_layers,
    telemetry.guard,
)


def find_problems(config: Config) -> list[str]:
    """List every impossible combination: which keys, their values, what would be valid."""
    return [problem for check in _CHECKS for problem in check(config)]
