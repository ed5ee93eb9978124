"""Rows of the tool on a tiny model; which configs accumulate how."""

from __future__ import annotations

import json

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.main_grad import MainGrad
from fp8lm.numerics import BLOCK_1X128, E2M5
from tests.launch.conftest import ROOT


def test_rows(run_tool, tmp_path):
    config, output = ROOT / "configs/gpt_tiny.yaml", tmp_path / "measured.json"
    keys = ("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2")
    keys += ("data.mock_data=true", "train.global_batch_size=2", "train.micro_batch_size=1")
    count = ("--micro-batches", 17, "--after", 1, "--json", output)
    assert run_tool("measure_accumulation", "--config", config, *count, *keys) == 0
    rows = {row["scheme"]: row for row in json.loads(output.read_text())}
    e4m3, e2m5, bf16 = (rows[name] for name in ("fp8_e4m3", "fp8_e2m5", "bf16"))
    assert e4m3["snr_db"] + 8 < e2m5["snr_db"] < bf16["snr_db"] - 8
    assert e2m5["fewer"]["1"]["snr_db"] > e2m5["fewer"]["4"]["snr_db"] > e2m5["snr_db"]
    assert all(abs(row["projection"] - 1) < 0.05 for row in rows.values())
    assert rows["fp8_e4m3, wgrad of 16"]["snr_db"] > e4m3["snr_db"] + 5
    assert (e4m3["bytes_per_parameter"], bf16["bytes_per_parameter"]) == (1, 2)
    assert {"gpt_175b": 128, "gpt_7b": 32}.items() <= e2m5["used_by"].items()
    assert all(row["worst_column_snr_db"] < row["median_column_snr_db"] for row in rows.values())
    assert bf16["zeroed"] < e2m5["zeroed"] < 0.01
    fine, long = rows["E3M4 in 1 x 128"], rows["E2M5 in 1 x 32"]
    assert fine["snr_db"] + 3 < e2m5["snr_db"] < long["snr_db"] + 3 < e2m5["snr_db"] + 6


def test_outliers_of_input_channels(run_tool, tmp_path):
    output = tmp_path / "measured.json"
    size = ("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2")
    keys = ("data.mock_data=true", "train.global_batch_size=2", "train.micro_batch_size=1", *size)
    options = ("--micro-batches", 2, "--outlier", 300, "--json", output)
    config = ROOT / "configs/gpt_tiny.yaml"
    assert run_tool("measure_accumulation", "--config", config, *options, *keys) == 0
    rows = {row["scheme"]: row for row in json.loads(output.read_text())}
    plain, even = rows["fp8_e2m5"], rows["E2M5, even columns"]
    assert plain["outlier"] == 300 and plain["zeroed"] > 10 * even["zeroed"]
    assert plain["median_column_snr_db"] + 15 < even["median_column_snr_db"]


@pytest.mark.parametrize("option", [("--micro-batches", 0), ("--outlier", 0)])
def test_options_are_checked(run_tool, option):
    assert (
        run_tool("measure_accumulation", "--config", ROOT / "configs/gpt_tiny.yaml", *option) == 2
    )


def gradients(outlier):
    generator = torch.Generator().manual_seed(0)
    terms = (1 + torch.randn(8, 16, 256, generator=generator)).bfloat16()
    terms[..., ::128] *= outlier
    return terms


def test_blocks_are_those_of_main_gradients(tool):
    module = tool("measure_accumulation")
    ours = module.BlockSum((16, 256), module.GRID_E2M5, BLOCK_1X128)
    grad = MainGrad((16, 256), E2M5, ReferenceKernels(), torch.device("cpu"))
    for dw in gradients(outlier=30):
        ours.add(dw)
        grad.add(dw)
    assert torch.equal(ours.value(), ReferenceKernels().dequantize(grad.value))


def test_e3m4_has_its_numbers(tool):
    grid = tool("measure_accumulation").GRID_E3M4
    codes = torch.arange(128)
    exponent, mantissa = codes // 16, codes % 16
    normal = torch.ldexp(1 + mantissa / 16, exponent - 3)
    numbers = torch.where(exponent == 0, mantissa / 64, normal)
    assert torch.equal(grid.round(numbers), numbers) and numbers.max() == grid.max
    between = (numbers[1:] + numbers[:-1]) / 2
    even = torch.where(codes[1:] % 2 == 0, numbers[1:], numbers[:-1])
    assert torch.equal(grid.round(-between), -even)


def test_even_columns_keep_the_neighbours_of_an_outlier(tool):
    module, terms = tool("measure_accumulation"), gradients(outlier=100)
    true = {"w": terms.double().sum(0)}

    def measured(**keys):
        made = module.BlockSum((16, 256), module.GRID_E2M5, BLOCK_1X128, **keys)
        for dw in terms:
            made.add(dw)
        return module.quality(true, {"w": made.value()})

    plain, even = measured(), measured(even_columns=True)
    assert plain.median_column_snr_db < 15 < 30 < even.median_column_snr_db
    assert plain.zeroed > 0.02 > 0.005 > even.zeroed
    assert abs(plain.projection - 1) < 0.01 and abs(even.projection - 1) < 0.01


def test_no_config_is_at_risk(tool):
    from fp8lm.numerics import accumulation_risk, format_by_name

    for dtype, users in tool("measure_accumulation").configs_by_scheme().items():
        for name, count in users.items():
            assert accumulation_risk(format_by_name(dtype), count) is None, name
