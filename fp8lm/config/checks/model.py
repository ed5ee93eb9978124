"""Checks of a model's sizes."""

from __future__ import annotations

from collections.abc import Iterator

from fp8lm.config.root import Config


def heads(config: Config) -> Iterator[str]:
    """Heads divide the hidden size, query groups the heads."""
    model = config.model
    heads = f"model.num_attention_heads = {model.num_attention_heads}"
    rounded = max(1, model.hidden_size // model.num_attention_heads)
    if model.hidden_size % model.num_attention_heads and model.kv_channels == rounded:
        yield f"model.hidden_size = {model.hidden_size} is not divisible by {heads}"
    if model.num_attention_heads % model.num_query_groups:
        yield f"{heads} is not divisible by model.num_query_groups = {model.num_query_groups}"


def positions(config: Config) -> Iterator[str]:
    """Sequences fit the positions, and RoPE has pairs of channels to rotate."""
    model = config.model
    if model.seq_length > model.max_position_embeddings:
        yield (
            f"model.seq_length = {model.seq_length} is longer than "
            f"model.max_position_embeddings = {model.max_position_embeddings}"
        )
    rotated = int(model.kv_channels * model.rotary_percent)
    if model.position_embedding_type == "rope" and (rotated % 2 or not rotated):
        yield (
            f"RoPE rotates pairs of channels, but model.kv_channels = {model.kv_channels} with "
            f"model.rotary_percent = {model.rotary_percent:g} gives {rotated}: it must be even"
        )
