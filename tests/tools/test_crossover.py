"""Where FP8 pays: the tool, and the warning's limit against the numbers on the page."""

from __future__ import annotations

import json
import sys

import pytest

from fp8lm.training.flops import LEAST_FP8_FLOPS, TERA
from tests.launch.conftest import ROOT


@pytest.mark.slow
def test_large_layers_gain_and_small_ones_lose(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import crossover

    sizes = ["--hidden-size", "256", "4096", "--tokens", "1024", "--preset", "o3"]
    crossover.main([*sizes, "--json", str(tmp_path / "found.json")])
    del sys.modules["crossover"]
    small, large = json.loads((tmp_path / "found.json").read_text())["cells"]
    assert small["speed"]["o3"] < 0.9 < 1.3 < large["speed"]["o3"]
    assert f"{large['speed']['o3']:.2f}" in capsys.readouterr().out


def test_the_warning_is_where_the_page_says_that_fp8_does_not_pay():
    """Within 5 % of no gain either may be said."""
    cells = json.loads((ROOT / "docs/benchmarks/crossover.json").read_text())["cells"]
    for cell in cells:
        warned = cell["tflop"] * TERA < LEAST_FP8_FLOPS
        for speed in (cell["speed"]["te"], cell["speed"]["o3"]):
            assert speed < 1.05 if warned else speed > 1.0
