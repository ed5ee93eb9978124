"""A trained model out of a checkpoint, without optimizer or data."""

from __future__ import annotations

import torch
from torch import nn

from fp8lm.config import Config, build_config
from fp8lm.data.tokenizer import Tokenizer, build_tokenizer, padded_vocab_size
from fp8lm.kernels import select_kernels
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.weight import named_weights
from fp8lm.model import GPTModel
from fp8lm.training.checkpoint import load_checkpoint, read_common
from fp8lm.training.shard import Shard
from fp8lm.training.state import model_tensors


def restore_model(
    folder: str, device: torch.device, iteration: int | None = None
) -> tuple[nn.Module, Tokenizer, Config]:
    """The model of a checkpoint in evaluation mode, its tokenizer and the config it ran with.

    Weights keep the format they were trained in. Raises `InputError` for what cannot be loaded.
    """
    config = build_config(read_common(folder, iteration)["config"])
    tokenizer = build_tokenizer(config.tokenizer)
    vocab_size = padded_vocab_size(
        tokenizer.vocab_size, config.model.make_vocab_size_divisible_by, tensor_parallel_size=1
    )
    recipe = Recipe.from_config(config.precision, select_kernels(device), device)
    model = GPTModel(config.model, vocab_size, recipe)
    tensors = model_tensors(named_weights(model))
    shards = {name: Shard.whole(tensor) for name, tensor in tensors.items()}
    load_checkpoint(folder, shards, iteration, partial=True)
    return model.eval(), tokenizer, config
