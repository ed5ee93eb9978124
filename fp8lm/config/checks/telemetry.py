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
_MOST_LAYERS = 10_000


def statistics_layers(config: Config) -> Iterator[str]:
    """Every pattern names a layer."""
    for pattern in config.logging.fp8_stats_layers:
        if not any(fnmatchcase(name, pattern) for name in observed_layers(config.model)):
            yield (
                f"logging.fp8_stats_layers = {pattern} matches no layer: names are "
                f"decoder.layers.0.{_LINEAR[0]} and the like, and * stands for anything"
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
    if config.logging.fp8_stats_what_if:
        yield f"{action} decides from what is cast: set logging.fp8_stats_what_if=false"


def observed_layers(model: ModelConfig) -> Iterator[str]:
    """Names of all layers that have statistics: those with a matrix; one after the other.

    Of more layers than any model has, which a damaged config can say, only the first.
    """
    yield "embedding.word_embeddings"
    if model.position_embedding_type == "learned_absolute":
        yield "embedding.position_embeddings"
    if model.untie_embeddings_and_output_weights:
        yield "output_layer"
    for layer in range(min(model.num_layers, _MOST_LAYERS)):
        yield from (f"decoder.layers.{layer}.{part}" for part in _LINEAR)
