"""What a cast does to a tensor, against the definitions; parts of a tensor add up to the whole."""

from __future__ import annotations

import pytest
import torch

from fp8lm.layers.quantizer import Quantizer
from fp8lm.numerics import (
    BF16,
    E2M5,
    E4M3,
    E5M2,
    FP16,
    FP32,
    PER_ROW,
    PER_TENSOR,
    ROOT_E4M4,
    granularity_of,
)
from fp8lm.telemetry.adam import sampled_runs
from fp8lm.telemetry.statistics import SAMPLE_ELEMENTS, measure, measure_all, sample, statistics_of
from tests.telemetry.direct import KERNELS, differences, direct


def statistics(x, quantized, before=None):
    sums, maxima = measure_all(x, quantized, KERNELS, before=before)
    return statistics_of(sums.tolist(), maxima.tolist())


def outliers(shape, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator)
    x[torch.rand(shape, generator=generator) < 0.1] = 0.0
    x[:, 1] *= 3000.0
    return x * scale


@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_against_the_definitions(fmt, scale, dtype):
    x = outliers((64, 96), scale).to(dtype)
    quantized = KERNELS.quantize(x, fmt)
    expected = direct([(x, quantized)])
    assert not differences(statistics(x, quantized), expected)
    assert expected["kurtosis"] > 30 and expected["sparsity"] > 0.05
    if fmt == E4M3:
        assert expected["underflow"] > 0.01


@pytest.mark.parametrize(
    ("fmt", "granularity"), [(E4M3, PER_ROW), (E2M5, granularity_of(E2M5, (64, 96)))], ids=str
)
def test_scales_of_blocks(fmt, granularity):
    x = outliers((64, 96))
    quantized = KERNELS.quantize(x, fmt, granularity=granularity)
    assert not differences(statistics(x, quantized), direct([(x, quantized)]))


def test_a_root():
    x = outliers((64, 96)).square()
    quantized = KERNELS.quantize(x, ROOT_E4M4)
    assert not differences(statistics(x, quantized), direct([(x, quantized)]))


@pytest.mark.parametrize("factor", [2.0**-6, 2.0**9])
def test_a_scale_that_does_not_follow(factor):
    x = outliers((64, 96))
    frozen = Quantizer(E4M3, KERNELS, share_amax=lambda amax: amax * factor)
    found = statistics(x, frozen(x))
    assert not differences(found, direct([(x, frozen(x))]))
    assert found["saturation"] > 1e-3 if factor < 1 else found["underflow"] > 0.5


def test_updates_that_are_lost():
    before = torch.tensor([1.0, 1.0, 1.0, -2.0])
    exact = torch.tensor([1.0, 1.01, 1.5, -2.001])
    quantized = KERNELS.quantize(exact, E4M3, amax=torch.tensor(2.0))
    assert statistics(exact, quantized, before)["lost"] == pytest.approx(2 / 3)
    assert "lost" not in statistics(exact, quantized, exact)
    assert "lost" not in statistics(exact, quantized)


def test_parts_add_up():
    """Of several ranks or micro-batches, with scales of their own."""
    x = torch.randn(200, 64)
    halves = [(part, KERNELS.quantize(part, E4M3)) for part in (x, 100 * x[:50])]
    measured = [measure(*half, KERNELS) for half in halves]
    sums = sum(sums for sums, _ in measured)
    maxima = torch.stack([maxima for _, maxima in measured]).amax(dim=0)
    assert not differences(statistics_of(sums.tolist(), maxima.tolist()), direct(halves))


@pytest.mark.parametrize("granularity", [PER_TENSOR, PER_ROW, PER_ROW.transposed()], ids=str)
def test_a_sample_of_a_large_tensor(granularity):
    """Shares are those of all elements but for a few percent, and no column is left out."""
    x = torch.randn(4 * SAMPLE_ELEMENTS // 768, 768)
    x[:, 7] *= 100.0
    x[torch.rand(x.shape) < 0.1] = 0.0
    x[-1, -2] = 700.0
    quantized = KERNELS.quantize(x, E4M3, granularity=granularity)
    sums, maxima = measure(x, quantized, KERNELS)
    found = statistics_of(sums.tolist(), maxima.tolist())
    assert sums[0] <= 1.01 * SAMPLE_ELEMENTS < x.numel()
    expected = direct([(x, quantized)])
    assert found["amax"] == 700.0
    names = ("sparsity", "saturation", "snr")
    if granularity == PER_TENSOR:  # with other scales a handful of elements
        names += ("underflow",)
    close = {name: expected[name] for name in names}
    assert not differences(found, close, 0.05)
    if granularity == PER_TENSOR:
        assert found["kurtosis"] == pytest.approx(expected["kurtosis"], rel=0.2)
        numbers = torch.arange(x.numel()).view_as(x)
        assert len((sample(quantized, numbers)[1] % 768).unique()) == 768


def test_runs_of_a_large_weight():
    assert sampled_runs(1000) == [slice(0, 1000)]
    numel = 5 * SAMPLE_ELEMENTS + 32
    runs = sampled_runs(numel)
    assert runs[0].start == 0 and numel - 128 < runs[-1].stop <= numel
    assert sum(run.stop - run.start for run in runs) == SAMPLE_ELEMENTS
    assert all(run.start % 128 == 0 for run in runs)


def test_zeros_and_what_is_no_number():
    zeros = torch.zeros(16, 16)
    found = statistics(zeros, KERNELS.quantize(zeros, E4M3))
    assert found == {
        "amax": 0.0,
        "scale": 1.0,
        "underflow": 0.0,
        "saturation": 0.0,
        "sparsity": 1.0,
    }
    bad = torch.ones(16, 16)
    bad[0, 0] = torch.nan
    found = statistics(bad, KERNELS.quantize(bad, E4M3))
    assert not {"amax", "scale", "snr", "kurtosis"} & found.keys()
    one = torch.ones(16, 16)
    found = statistics(one, KERNELS.quantize(one, E4M3, amax=torch.tensor(torch.nan)))
    assert found["snr"] == 0.0 and found["amax"] == 1.0
    assert statistics_of([0.0] * 9, [0.0] * 2) == {}
