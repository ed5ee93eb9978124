"""Every kind of tensor is observed, none is changed, and an unobserved step runs nothing more."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp8lm.config import OptimizerConfig, PrecisionConfig
from fp8lm.layers.param import named_params
from fp8lm.model.objectives import LanguageModeling
from fp8lm.optim import AdamW, StatePrecision
from fp8lm.telemetry.observing import KINDS, REDUCED, ModelObserver, linears_of
from fp8lm.telemetry.table import StatisticsTable
from fp8lm.training.state import model_tensors, optimizer_tensors
from fp8lm.training.step import train_step
from tests.model.tiny import CPU, KERNELS, batch, build

pytestmark = pytest.mark.slow

LAYER = "decoder.layers.1.mlp.linear_fc2"


class Recorded(StatisticsTable):
    """A table that counts what is added to its rows."""

    def __init__(self, rows):
        super().__init__(rows, CPU)
        self.added = []

    def add(self, row, measured):
        self.added.append(row)
        super().add(row, measured)


class Operations(TorchDispatchMode):
    """Names of the operations that run while it is entered."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def trained(preset, observed, patterns=("*",), steps=2, **options):
    """State and losses of a model after `steps`; the table, and the operations of the last."""
    precision = dict(preset=preset)
    gpt = build({}, precision)
    weights = named_params(gpt)
    states = StatePrecision.from_config(PrecisionConfig(**precision))
    adam = AdamW(weights, OptimizerConfig(lr=1e-2), states, KERNELS, seed=1)
    generator = torch.Generator().manual_seed(3)
    for name, weight in weights.items():
        adam.initialize(name, 0.2 * torch.randn(weight.spec.shape, generator=generator))
    observer = ModelObserver(linears_of([gpt]), adam, KERNELS, patterns, **options)
    table, losses = Recorded(observer.rows), []
    for step in range(steps):
        context = observer.observing(table) if observed(step) else contextlib.nullcontext()
        with context, Operations() as operations:
            batches = [batch(2 * step), batch(2 * step + 1)]
            losses.append(train_step(gpt, adam, LanguageModeling(), batches, 1e-2).loss)
    state = model_tensors(weights) | optimizer_tensors(adam)
    return state, losses, table, operations.names


@pytest.mark.parametrize(
    ("preset", "what_if"),
    [
        ("bf16", False),
        ("bf16", True),
        ("te", False),
        ("o1", False),
        ("o3", False),
        ("o3_long", False),
        ("o4", False),
    ],
)
def test_nothing_is_changed(preset, what_if):
    state, losses, table, _ = trained(preset, lambda step: True, what_if=what_if)
    plain, plain_losses, unused, _ = trained(preset, lambda step: False)
    assert losses == plain_losses and not unused.added
    assert all(torch.equal(state[key], tensor) for key, tensor in plain.items())
    kinds = {kind for layer, kind in table.added if layer == LAYER}
    assert kinds == set(KINDS) - {*REDUCED, "send_grad"}
    embedding = {kind for layer, kind in table.added if layer == "embedding.word_embeddings"}
    assert embedding == {"weight", "main_grad", "master", "exp_avg", "exp_avg_sq"}


def test_other_steps_run_no_operation_more():
    *_, after = trained("o3", lambda step: step == 0)
    *_, never = trained("o3", lambda step: False)
    *_, observed = trained("o3", lambda step: step == 1)
    assert after == never and len(observed) > len(never)


def test_chosen_layers_only():
    *_, table, _ = trained("o3", lambda step: True, ("*.1.mlp.*", "embedding.*"), steps=1)
    layers = {layer for layer, _ in table.added}
    mlp = {"decoder.layers.1.mlp.linear_fc1", "decoder.layers.1.mlp.linear_fc2"}
    assert layers == {*mlp, "embedding.word_embeddings"} == {layer for layer, _ in table.rows}
