"""Faults put into one layer of a run are found within ten steps, and named; without, nothing is."""

from __future__ import annotations

import pytest
import torch

from fp8lm.telemetry.findings import find
from fp8lm.telemetry.table import statistics_in

pytestmark = pytest.mark.slow

MODEL = {"num_layers": 6, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16}
TRAIN = {"train_iters": 10, "eval_iters": 0}
FC1 = "decoder.layers.3.mlp.linear_fc1"
PROJ = "decoder.layers.3.self_attention.linear_proj"
QKV = "decoder.layers.3.self_attention.linear_qkv"


@pytest.fixture
def statistics_of_run(tiny_config, train_run, read_metrics, tmp_path):
    """`statistics_of_run(inject)`: those of ten steps of a model that `inject` has changed."""

    def run(inject, **precision):
        logging = {"dir": str(tmp_path), "fp8_stats_interval": 5}
        sections = {"model": MODEL, "train": TRAIN, "logging": logging, "precision": precision}
        config = tiny_config(sections)
        train_run(config, lambda trainer: inject(dict(trainer.run.model.named_modules())))
        return [found for line in read_metrics(tmp_path) if (found := statistics_in(line))][-1]

    return run


def frozen_scale(modules):
    """A scale for inputs of at most 0.01, whatever they are."""
    modules[QKV].quantizers["input"].share_amax = lambda amax: torch.full_like(amax, 0.01)


def large_output(modules):
    multiply_output(modules[FC1], 2.0**12)


def dead_layer(modules):
    multiply_output(modules[FC1], 0.0)


def multiply_output(layer, factor):
    """Of a layer that returns its input, too, for the residual path."""
    layer.register_forward_hook(lambda module, inputs, found: (found[0] * factor, found[1]))


def outlier_channel(modules):
    factors = torch.ones(MODEL["hidden_size"])
    factors[5] = 300.0
    modules[PROJ].register_forward_pre_hook(
        lambda module, inputs: (inputs[0] * factors.bfloat16(),)
    )


FAULTS = {
    "frozen scale": (frozen_scale, {(QKV, "input", "saturation"), (QKV, "input", "snr")}),
    "large output": (
        large_output,
        {("decoder.layers.3.mlp.linear_fc2", "input", "amax")},
    ),
    "dead layer": (
        dead_layer,
        {
            ("decoder.layers.3.mlp.linear_fc2", "input", "sparsity"),
            (FC1, "grad_output", "sparsity"),
            (FC1, "main_grad", "sparsity"),
        },
    ),
    "outlier channel": (outlier_channel, {(PROJ, "input", "kurtosis")}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault, statistics_of_run):
    inject, expected = FAULTS[fault]
    findings = find(statistics_of_run(inject))
    named = {(finding.layer, finding.kind, finding.statistic) for finding in findings}
    assert expected <= named
    assert findings[0].layer.startswith("decoder.layers.3.")
    assert all(finding.severity > 1 and finding.key and finding.sentence for finding in findings)


@pytest.mark.parametrize("preset", ["bf16", "te", "o3", "o3_long", "o4"])
def test_a_healthy_run_has_none(preset, statistics_of_run):
    assert find(statistics_of_run(lambda modules: None, preset=preset)) == []


def test_updates_that_are_lost():
    row = ("decoder.layers.0.mlp.linear_fc1", "master")
    found = {row: {"lost": 0.8, "snr": 70.0}}
    assert [finding.statistic for finding in find(found, stochastic_master=False)] == ["lost"]
    assert find(found) == []


def test_what_all_layers_share_is_no_finding():
    rows = {(f"decoder.layers.{i}.mlp.linear_fc1", "input"): {"kurtosis": 90.0} for i in range(4)}
    assert find(rows) == []
    rows["decoder.layers.4.mlp.linear_fc1", "input"] = {"kurtosis": 900.0}
    assert [finding.layer for finding in find(rows)] == ["decoder.layers.4.mlp.linear_fc1"]
