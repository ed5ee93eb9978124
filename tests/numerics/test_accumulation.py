"""What is expected of long sums, against sums of random gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.main_grad import MainGrad
from fp8lm.numerics import BF16, E2M5, E4M3, FP32, accumulation_risk, expected_snr

KERNELS = ReferenceKernels()
BENCHMARKS = Path(__file__).parents[2] / "docs/benchmarks"


def kept(fmt, count, share):
    """Projection and SNR of `count` gradients, `share` of whose variance they have in common."""
    generator = torch.Generator().manual_seed(count)
    common, exact = torch.randn(64, 256, generator=generator), 0.0
    grad = MainGrad((64, 256), fmt, KERNELS, torch.device("cpu"))
    for _ in range(count):
        own = torch.randn(64, 256, generator=generator)
        dw = common * share**0.5 + own * (1 - share) ** 0.5
        exact = exact + dw.double()
        grad.add(dw)
    error = KERNELS.dequantize(grad.value).double() - exact
    signal = exact.square().sum()
    return 1 + (error * exact).sum() / signal, 10 * torch.log10(signal / error.square().sum())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_sum_of_128_gradients_in_e2m5(share):
    projection, snr = kept(E2M5, 128, share)
    assert abs(projection - 1) <= 0.005 and snr >= 25.0


def test_e4m3_loses_what_is_common_to_128_gradients():
    """Random ones keep the projection, as a walk does; a sum that grows steadily does not."""
    projection, snr = kept(E4M3, 128, 0.9)
    assert projection < 0.9 and snr < 15.0


@pytest.mark.parametrize("fmt", [E4M3, E2M5], ids=repr)
def test_more_terms_less_is_left(fmt):
    expected = [expected_snr(fmt, count) for count in (1, 2, 12, 16, 100, 128, 1000)]
    assert expected == sorted(expected, reverse=True) and len(set(expected)) == 7
    assert expected_snr(E2M5, 128) >= 25.0 > expected_snr(E4M3, 16)


@pytest.mark.parametrize("fmt", [E4M3, E2M5], ids=repr)
def test_expectation_is_the_lower_measurement(fmt):
    lowest = {}
    for name in ("initial", "late"):
        rows = json.loads((BENCHMARKS / f"accumulation_{name}.json").read_text())
        (row,) = (row for row in rows if row["scheme"] == fmt.name)
        for count, quality in row["fewer"].items():
            lowest[count] = min(quality["snr_db"], lowest.get(count, math.inf))
    for count in (1, 8, 16, 32, 64, 128):
        assert 0 <= lowest[str(count)] - expected_snr(fmt, count) <= 1.0


@pytest.mark.parametrize("fmt", [BF16, FP32], ids=repr)
def test_wide_formats_have_no_risk(fmt):
    assert expected_snr(fmt, 10**6) == math.inf
    assert accumulation_risk(fmt, 10**6) is None


def test_a_risk_names_its_numbers_and_the_cure():
    assert accumulation_risk(E4M3, 8) is None
    for text in ("32 micro-batches", "fp8_e4m3", "18 dB", "precision.main_grads_dtype=fp8_e2m5"):
        assert text in accumulation_risk(E4M3, 32)
    assert "bf16" in accumulation_risk(E2M5, 1024)
    assert "dB" not in accumulation_risk(E4M3, 100_000)
