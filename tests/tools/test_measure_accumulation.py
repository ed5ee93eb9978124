"""Rows of the tool on a tiny model; which configs accumulate how."""

from __future__ import annotations

import json

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


def test_it_needs_micro_batches(run_tool):
    config = ROOT / "configs/gpt_tiny.yaml"
    assert run_tool("measure_accumulation", "--config", config, "--micro-batches", 0) == 2


def test_no_config_is_at_risk(tool):
    from fp8lm.numerics import accumulation_risk, format_by_name

    for dtype, users in tool("measure_accumulation").configs_by_scheme().items():
        for name, count in users.items():
            assert accumulation_risk(format_by_name(dtype), count) is None, name
