"""The norms of a model: over the hidden dimension, and over a head of queries and keys."""

from __future__ import annotations

from torch import nn

from fp8lm.config import ModelConfig
from fp8lm.layers.norm import NORMS
from fp8lm.layers.recipe import Recipe


def hidden_norm(config: ModelConfig, recipe: Recipe) -> nn.Module:
    """Over the hidden dimension; with sequence parallelism a rank sees its part of the tokens."""
    return _norm(config, config.hidden_size, recipe, recipe.tp.sequence_parallel)


def head_norm(config: ModelConfig, recipe: Recipe) -> nn.Module:
    """Over the channels of a head; with tensor parallelism a rank sees its part of the heads."""
    return _norm(config, config.kv_channels, recipe, recipe.tp.size > 1)


def _norm(config: ModelConfig, size: int, recipe: Recipe, partial_gradient: bool) -> nn.Module:
    return NORMS[config.normalization](
        size,
        config.norm_epsilon,
        recipe.high_precision,
        recipe.kernels,
        recipe.device,
        sequence_parallel=partial_gradient,
    )
