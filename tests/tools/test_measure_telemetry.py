"""What statistics cost: little of a step, and nothing that waits for the device."""

from __future__ import annotations

import json

import pytest

from tests.launch.conftest import ROOT

CONFIG = ROOT / "configs/gpt_tiny.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["hopper", "triton"])
def test_cost_of_an_observed_step(kernels, run_tool, tmp_path, capsys):
    """Traced on the meta device, which has no values: an observed step asks for none."""
    if kernels == "triton":
        pytest.importorskip("triton")
    output = tmp_path / "cost.json"
    sizes = ("model.hidden_size=1024", "model.num_attention_heads=8", "model.seq_length=2048")
    options = ("--kernels", kernels, "--json", output, *sizes)
    assert run_tool("measure_telemetry", "--config", CONFIG, *options) == 0
    found = json.loads(output.read_text())
    plain, observed = found["plain"], found["observed"]
    assert observed["launches"] > plain["launches"] and observed["moved"] > plain["moved"]
    extra = found["seconds"]["observed"] / found["seconds"]["plain"] - 1
    assert found["share"] == pytest.approx(extra / 100)
    assert f"{100 * found['share']:.2f} %" in capsys.readouterr().out


def test_the_stated_cost():
    """At an interval of 100 statistics of a 7B model cost less than 3 %."""
    found = json.loads((ROOT / "docs/benchmarks/telemetry_gpt_7b.json").read_text())
    assert found["interval"] == 100 and found["config"] == "configs/gpt_7b.yaml"
    assert 0 < found["share"] < 0.03
