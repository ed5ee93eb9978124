"""Scales from sizes alone."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.config import PrecisionConfig
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.amax_history import AmaxHistories
from fp8lm.layers.quantizer import Quantizer
from fp8lm.layers.unit_scale import UnitScale
from fp8lm.numerics import E4M3, E5M2

KERNELS = ReferenceKernels()


@pytest.mark.parametrize(("in_features", "scale"), [(256, 16.0), (300, 16.0), (1024, 32.0)])
def test_a_weight_has_the_root_of_its_inputs(in_features, scale):
    quantizer = Quantizer(E4M3, KERNELS, known_scale=UnitScale.of_weight(in_features))
    assert quantizer(torch.randn(4, 8) * 1e6).scale == scale == quantizer(torch.zeros(4, 8)).scale


def test_what_exceeds_the_format_saturates_and_a_fault_is_seen():
    quantizer = Quantizer(E4M3, KERNELS, known_scale=UnitScale())
    assert KERNELS.dequantize(quantizer(torch.tensor([[500.0, 1.0]]))).tolist() == [[448.0, 1.0]]
    assert KERNELS.dequantize(quantizer(torch.tensor([[math.inf, 1.0]]))).isnan().all()


def test_an_output_gradient_counts_tokens():
    quantizer = Quantizer(E5M2, KERNELS, known_scale=UnitScale())
    precision = PrecisionConfig(preset="unit")
    held = AmaxHistories(
        {("layer", "grad_output"): quantizer}, precision, torch.device("cpu"), torch.clone
    )
    with held.recording(1000):
        assert quantizer(torch.ones(2, 2)).scale == 512.0
    held.update(torch.tensor(False))
    assert not held.by_key  # nothing to keep
