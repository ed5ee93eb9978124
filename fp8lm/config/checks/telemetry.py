"""Checks of statistics and of the guard that looks at them."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from fp8lm.config.model import ModelConfig
from fp8lm.config.root import Config

_LINEAR = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def statistics_layers(config: Config) -> Iterator[str]:
    """Every pattern names a layer."""
    names = observed_layers(config.model)
    for pattern in config.logging.fp8_stats_layers:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield (
                f"logging.fp8_stats_layers = {pattern} matches no layer: names are "
                f"{names[1]} and the like, and * stands for anything"
            )


def guard(config: Config) -> Iterator[str]:
    """A guard has FP8 GEMMs to watch over, and statistics to look at."""
    action = f"precision.guard.action = {config.precision.guard.action}"
    if config.precision.guard.action == "off":
        return
    if config.logging.fp8_stats_interval is None:
        yield f"{action} needs statistics: set logging.fp8_stats_interval, to 10 for instance"
    if config.precision.gemm != "fp8":
        yield f"{action} watches over FP8 GEMMs, and precision.gemm = {config.precision.gemm}"


def observed_layers(model: ModelConfig) -> list[str]:
    """Names of all layers that have statistics: those with a matrix."""
    names = ["embedding.word_embeddings"]
    names += [f"decoder.layers.{i}.{part}" for i in range(model.num_layers) for part in _LINEAR]
    if model.position_embedding_type == "learned_absolute":
        names.append("embedding.position_embeddings")
    if model.untie_embeddings_and_output_weights:
        names.append("output_layer")
    return names
