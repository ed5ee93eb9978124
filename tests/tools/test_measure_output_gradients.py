"""Rows of the tool on a tiny model: a bit more of mantissa shows in all three tensors."""

from __future__ import annotations

import json

import pytest

from tests.launch.conftest import ROOT

CONFIG = ROOT / "configs/gpt_tiny.yaml"


def test_rows(run_tool, tmp_path, capsys):
    output = tmp_path / "measured.json"
    size = ("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2")
    keys = ("data.mock_data=true", "train.global_batch_size=2", "train.micro_batch_size=1", *size)
    options = ("--after", 1, 0, "--json", output)
    assert run_tool("measure_output_gradients", "--config", CONFIG, *options, *keys) == 0
    rows = json.loads(output.read_text())
    assert "E4M3, row throughout" in capsys.readouterr().out
    by = {(row["scheme"], row["after_steps"], row["layer"]): row for row in rows}
    assert len(by) == 8 * 2 * 4
    for step in (0, 1):
        for layer in ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"):
            key = (step, f"decoder.layers.0.{layer}")
            e5m2, e4m3, row, exact = (
                by[name, *key] for name in ("E5M2, tensor", "E4M3, tensor", "E4M3, row", "exact")
            )
            # Roundings of 2 and 3 bits of mantissa: 25.5 and 31.5 dB of values spread evenly.
            assert e5m2["dy_snr"] == pytest.approx(25.5, abs=1)
            assert e4m3["dy_snr"] == pytest.approx(31.5, abs=1)
            for tensor in ("dx_snr", "dw_snr", "token_snr"):
                assert e5m2[tensor] + 1 < e4m3[tensor] < exact[tensor]
            assert exact["dy_snr"] is None and exact["zeroed"] == 0
            assert row["zeroed"] <= e4m3["zeroed"]


def test_steps_are_no_less_than_none(run_tool):
    assert run_tool("measure_output_gradients", "--config", CONFIG, "--after", -1) == 2
