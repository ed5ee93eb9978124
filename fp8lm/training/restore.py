"""A trained model out of a checkpoint, without optimizer or data."""

from __future__ import annotations

import torch
from torch import nn

from fp8lm.checkpoint import load_checkpoint, open_checkpoint
from fp8lm.config import Config, build_config
from fp8lm.data.tokenizer import Tokenizer, build_tokenizer
from fp8lm.kernels import select_kernels
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.weight import named_weights
from fp8lm.model import GPTModel
from fp8lm.training.build import table_rows
from fp8lm.training.state import model_shards


def restore_model(
    folder: str, device: torch.device, iteration: int | None = None
) -> tuple[nn.Module, Tokenizer, Config]:
    """The model of a checkpoint in evaluation mode, its tokenizer and the config it ran with.

    Weights keep the format they were trained in. Raises `InputError` for what cannot be loaded.
    """
    checkpoint = open_checkpoint(folder, iteration)
    config = build_config(checkpoint.common["config"])
    tokenizer = build_tokenizer(config.tokenizer)
    vocab_size = table_rows(config, tokenizer.vocab_size)
    recipe = Recipe.from_config(config.precision, select_kernels(device), device)
    model = GPTModel(config.model, vocab_size, recipe, num_ids=tokenizer.vocab_size)
    load_checkpoint(checkpoint, model_shards(named_weights(model)), passing_over="")
    return model.eval(), tokenizer, config
