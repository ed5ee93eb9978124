"""Training steps of others, which tools/bench_step.py times beside this project's.

All train the GPT of plain_gpt.py with the same optimizer; what computes its layers differs:

    plain                 eager PyTorch, BF16
    compiled              the same through torch.compile
    torchao_tensorwise    torch.compile with the FP8 GEMMs of torchao.float8, a scale per tensor
    torchao_rowwise       the same with a scale per row
    te_current            TransformerEngine's Linear in FP8, current scaling, eager
    te_delayed            the same with delayed scaling

On a CPU torchao computes in BF16 with values that FP8 holds, which tests the way there, no speed.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from plain_gpt import PlainGPT
from torch import Tensor, nn

from fp8lm.runtime.errors import InputError

# What `ratio to` columns and files of results call them.
TITLES = {
    "plain": "plain PyTorch",
    "compiled": "compiled PyTorch",
    "torchao_tensorwise": "torchao tensorwise",
    "torchao_rowwise": "torchao rowwise",
    "te_current": "TE current",
    "te_delayed": "TE delayed",
}
INSTALL = {
    "torchao": "pip install torchao",
    "transformer_engine": 'pip install --no-build-isolation "transformer-engine[pytorch]"',
}


def build_baseline(name: str, model: PlainGPT) -> nn.Module:
    """`model` with the layers of baseline `name`, compiled where that is; InputError: missing."""
    if name not in TITLES:
        raise InputError(f"--baselines: {name} is none of {', '.join(TITLES)}")
    program, _, variant = name.partition("_")
    if program == "torchao":
        model = _with_torchao(model, variant)
    elif program == "te":
        return _WithTransformerEngine(model, variant)
    return model if name == "plain" else torch.compile(model)  # type: ignore[return-value]


def _with_torchao(model: PlainGPT, recipe: str) -> PlainGPT:
    float8 = _import("torchao.float8")
    config = float8.Float8LinearConfig.from_recipe_name(recipe)
    if next(model.parameters()).device.type == "cpu":
        config = dataclasses.replace(config, emulate=True)
    float8.convert_to_float8_training(model, config=config)
    return model


class _WithTransformerEngine(nn.Module):
    """The model with every `nn.Linear` replaced, run in TransformerEngine's FP8 context."""

    def __init__(self, model: PlainGPT, scaling: str) -> None:
        super().__init__()
        engine, recipes = _import("transformer_engine.pytorch"), "transformer_engine.common.recipe"
        kind = {"current": "Float8CurrentScaling", "delayed": "DelayedScaling"}[scaling]
        recipe = getattr(_import(recipes), kind)()
        self.model = model
        self._context: Callable[[], Any] = partial(engine.fp8_autocast, True, fp8_recipe=recipe)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, _replacement(child, engine.Linear))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,S] -> [B,S,V]."""
        with self._context():
            return self.model(tokens)


def _replacement(layer: nn.Linear, kind: Callable[..., Any]) -> nn.Module:
    """A layer of `kind` (TransformerEngine's Linear) with the parameters of `layer`."""
    sizes = (layer.in_features, layer.out_features)
    new = kind(*sizes, params_dtype=layer.weight.dtype, device=layer.weight.device)
    with torch.no_grad():
        new.weight.copy_(layer.weight)
        new.bias.copy_(layer.bias)
    return new


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise InputError(
            f"--baselines: {package} cannot be imported ({error}): {INSTALL[package]}"
        ) from None
