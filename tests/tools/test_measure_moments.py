"""Rows of the tool on a tiny model, whose second moments are stored by each scheme."""

from __future__ import annotations

import json

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.numerics import ROOT_E4M4
from tests.launch.conftest import ROOT

CONFIG = ROOT / "configs/gpt_tiny.yaml"
TINY = (
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "data.mock_data=true",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
    "train.eval_iters=1",
)


def test_rows(run_tool, tmp_path):
    output = tmp_path / "moments.json"
    nearest = ("root of E4M3, to nearest", "root of E4M4, to nearest")
    only = ("--only", "fp16", "fp8_e4m3", "fp8_e4m4_root", *nearest)
    options = (*only, "--steps", 8, "--seeds", 1, 2, "--json", output)
    assert run_tool("measure_moments", "--config", CONFIG, *options, *TINY) == 0
    rows = {row["scheme"]: row for row in json.loads(output.read_text())["rows"]}
    distances = {name: max(row["distances"].values()) for name, row in rows.items()}
    assert all(len(row["losses"]) == 2 for row in rows.values())
    assert distances["fp16"] < 0.01
    assert 0.01 < distances["fp8_e4m4_root"] < 0.2 < distances["fp8_e4m3"]
    assert distances[nearest[1]] < distances[nearest[0]]


def test_it_needs_steps(run_tool):
    assert run_tool("measure_moments", "--config", CONFIG, "--steps", 0) == 2


def test_grid_is_that_of_the_format(tool):
    moments, kernels = tool("measure_moments"), ReferenceKernels()
    v = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)).pow(8)
    stored = moments.of_root(4, None, stochastic=False)(v.double(), torch.Generator())
    quantized = kernels.quantize(v, ROOT_E4M4)
    assert torch.equal(stored.float(), kernels.dequantize(quantized))


@pytest.mark.parametrize("name", ["companded", "expanded", "unsigned_e5m3"])
def test_errors_are_those_of_eight_bits(tool, name):
    v = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)).double() + 0.01
    stored = getattr(tool("measure_moments"), name)(v, torch.Generator())
    error = ((stored - v) / v).abs()
    assert error.max() < 0.2 and error.mean() > 1e-4
