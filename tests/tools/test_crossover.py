"""Where FP8 pays: the tool, and the warning's limit against the numbers on the page."""

from __future__ import annotations

import json
import sys

import pytest

from fp8lm.planner.tracing.roofline import Hardware
from fp8lm.runtime.errors import InputError
from fp8lm.training.flops import LEAST_FP8_FLOPS, TERA
from tests.launch.conftest import ROOT


@pytest.fixture
def crossover(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import crossover

    yield crossover
    del sys.modules["crossover"]


@pytest.mark.slow
def test_large_layers_gain_and_small_ones_lose(crossover, tmp_path, capsys):
    sizes = ["--hidden-size", "256", "4096", "--tokens", "1024", "--preset", "o3"]
    crossover.main([*sizes, "--json", str(tmp_path / "found.json")])
    small, large = json.loads((tmp_path / "found.json").read_text())["cells"]
    assert small["speed"]["o3"] < 0.9 < 1.3 < large["speed"]["o3"]
    assert f"{large['speed']['o3']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [(4096, 3000), (4096, 1000), (1000, 1024)])
def test_sizes_that_there_are_not(crossover, sizes):
    with pytest.raises(InputError, match="multiples of 16"):
        crossover.sized(ROOT / "configs/gpt_7b.yaml", "o3", *sizes)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_a_7b_layer_is_faster_than_bf16(crossover, samples):
    """By 1.45 at least, with the copies of weights that a byte per parameter holds for a step."""
    hardware = Hardware.find("h200")
    faster, plain = (
        crossover.sized(ROOT / "configs/gpt_7b.yaml", preset, 4096, samples * 2048)
        for preset in ("o3", "bf16")
    )
    cached = faster.precision.model_copy(update={"cache_weight_operands": True})
    faster = faster.model_copy(update={"precision": cached})
    seconds = [crossover.layer_seconds(config, hardware) for config in (plain, faster)]
    assert seconds[0] / seconds[1] >= 1.45


def test_the_warning_is_where_the_page_says_that_fp8_does_not_pay():
    """Within 5 % of no gain either may be said."""
    cells = json.loads((ROOT / "docs/benchmarks/crossover.json").read_text())["cells"]
    for cell in cells:
        warned = cell["tflop"] * TERA < LEAST_FP8_FLOPS
        for speed in (cell["speed"]["te"], cell["speed"]["o3"]):
            assert speed < 1.05 if warned else speed > 1.0
