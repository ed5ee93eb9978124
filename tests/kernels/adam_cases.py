"""Weights of several shapes and what one AdamW step of them needs, for the tests of backends."""

from __future__ import annotations

import torch

from fp8lm.config import PrecisionConfig
from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.rounding import ElementIndex
from fp8lm.numerics import format_by_name, granularity_of, scale_from_amax
from fp8lm.optim import StatePrecision
from fp8lm.scaled_tensor import ScaledTensor


class Tensors:
    """What a step of weights of several shapes needs, random but for the seed, on `device`."""

    def __init__(self, shapes, formats, device, *, scale=1.0, index=None):
        self._generator, self._device = torch.Generator().manual_seed(3), device
        self.params = []
        for row, shape in enumerate(shapes):
            g, weight, master, m, v = formats
            own = weight if master is None else master
            self.params.append(
                AdamParam(
                    row=row,
                    gradient=self._stored(1e-2 * scale, shape, g),
                    model_param=None if master is None else self._stored(0.02, shape, weight),
                    master=self._stored(0.02, shape, own),
                    exp_avg=self._stored(1e-2 * scale, shape, m),
                    exp_avg_sq=self._stored(1e-4 * scale**2, shape, v, positive=True),
                    weight_decay=0.1 * (row != 1),
                    index=index or ElementIndex(first=1000 * row),
                )
            )

    def _stored(self, scale, shape, fmt, *, positive=False):
        value = torch.randn(shape, generator=self._generator) * scale
        value = value.abs() if positive else value
        if not value.numel():
            return ScaledTensor.zeros(shape, fmt, self._device, granularity_of(fmt, shape))
        stored = ReferenceKernels().quantize(value, fmt, granularity=granularity_of(fmt, shape))
        return ScaledTensor(
            stored.payload.to(self._device), stored.scale.to(self._device), fmt, stored.granularity
        )

    def table(self, rounding):
        """New scales, so that some values saturate and many are subnormal."""
        rows = [
            torch.stack(
                [
                    scale_from_amax(torch.tensor(amax, device=self._device), tensor.format)
                    for amax, tensor in zip(
                        (0.05, 0.05, 0.03, 2e-4),
                        (p.model_param or p.master, *p.states),
                        strict=True,
                    )
                ]
            )
            for p in self.params
        ]
        keys = torch.arange(len(rows), device=self._device) * 0x3779B1 - 77
        scales = torch.stack(rows) if rows else torch.ones(0, 4, device=self._device)
        return AdamTable(scales, keys.to(torch.int32), rounding)


def coefficients(device, **changes):
    numbers = {"clip_factor": 0.7, "bias_correction1": 0.271, "bias_correction2": 0.1426}
    scalars = {name: torch.tensor(value, device=device) for name, value in numbers.items()}
    plain = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "lr": 3e-3}
    return AdamCoefficients(**{**plain, **scalars, "largest_update": None, "skip": None, **changes})


def stored_tensors(params):
    return [x for p in params for x in (*p.states, *([p.model_param] if p.model_param else []))]


def formats_of(preset):
    """Those of the linear layers' matrices, and the rounding."""
    precision = PrecisionConfig(preset=preset)
    states, stored = StatePrecision.from_config(precision), format_by_name(precision.params_dtype)
    gradient = format_by_name(precision.main_grads_dtype)
    formats = (gradient, stored, states.master, states.exp_avg, states.exp_avg_sq)
    return formats, states.rounding
