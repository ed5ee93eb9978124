"""A training step asks the device for no value: on the meta device, which has none, it runs whole.

There `.item()`, `.tolist()` and `bool()` raise, as does an operation that mixes tensors of both
devices (of one dimension or more). On a GPU either would stop the host in every step.
"""

from __future__ import annotations

import pytest
import torch

from fp8lm.config import OptimizerConfig, PrecisionConfig
from fp8lm.kernels.hopper import HopperKernels
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.weight import named_weights
from fp8lm.model import GPTModel
from fp8lm.optim import AdamW, StatePrecision
from fp8lm.training.step import evaluate, train_step
from tests.model.tiny import BATCH, SEQUENCE, SHAPES, VOCABULARY, model_config

META = torch.device("meta")
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def batch():
    shape = (BATCH, SEQUENCE)
    return {
        "tokens": torch.zeros(shape, dtype=torch.int64, device=META),
        "labels": torch.zeros(shape, dtype=torch.int64, device=META),
        "loss_mask": torch.ones(shape, device=META),
        "samples": torch.zeros(BATCH, dtype=torch.int64, device=META),
    }


def made(model, preset):
    precision = PrecisionConfig(preset=preset)
    kernels = HopperKernels()
    recipe = Recipe.from_config(precision, kernels, META)
    config = model_config(**SHAPES[model], **DROPOUT)
    gpt = GPTModel(config, VOCABULARY, recipe, num_ids=VOCABULARY - 3)
    states = StatePrecision.from_config(precision)
    adam = AdamW(named_weights(gpt), OptimizerConfig(lr=1e-3), states, kernels, seed=1)
    for name, weight in adam.weights.items():
        adam.initialize(name, torch.zeros(weight.spec.shape))
    return gpt, adam


@pytest.mark.parametrize("model", ["gpt", "llama"])
@pytest.mark.parametrize("preset", ["bf16", "te", "o1", "o2", "o3"])
def test_a_step_and_an_evaluation(preset, model):
    gpt, adam = made(model, preset)
    step = train_step(gpt, adam, [batch(), batch()], 1e-3)
    loss = evaluate(gpt, [batch()])
    assert {x.device for x in (step.loss, step.grad_norm, step.skipped, step.stop, loss)} == {META}
