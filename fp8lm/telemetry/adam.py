"""Statistics of the optimizer's casts, by computing the step's result before the step does.

The kernel keeps no value that it has rounded. So a step that is observed is done twice: here on a
sample with nothing written, through the same arithmetic, scales and noise, and then as ever. Of a
large weight the sample is a few evenly spaced runs of its elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fp8lm.kernels.adam import AdamFactors, adam_, state_payloads
from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.interface import Kernels
from fp8lm.numerics import FP32
from fp8lm.numerics.granularity import BLOCK
from fp8lm.scaled_tensor import ScaledTensor
from fp8lm.telemetry.statistics import SAMPLE_ELEMENTS

RUNS = 4
STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")
# A kind, its exact values (fp32), what is stored of them, and what was stored before.
StateCast = tuple[str, Tensor, ScaledTensor, Tensor | None]


def step_casts(
    kernels: Kernels,
    param: AdamParam,
    table: AdamTable,
    coefficients: AdamCoefficients,
) -> Iterator[StateCast]:
    """The casts of one step over a sample of `param`; `weight` is the model parameter."""
    factors = AdamFactors.of(coefficients, param.weight_decay)
    for block in sampled_runs(param.gradient.payload.numel()):
        old, m, v = (_values(kernels, state, block) for state in param.states)
        w, g = old.clone(), _values(kernels, param.gradient, block)
        adam_(w, g, m, v, factors)
        yield from _casts(kernels, param, table, (w, m, v), old, block.start)


def sampled_runs(numel: int) -> list[slice]:
    """Runs of elements that are measured: all, or `RUNS` from the first to the last."""
    if numel <= SAMPLE_ELEMENTS:
        return [slice(0, numel)]
    length = SAMPLE_ELEMENTS // RUNS
    starts = [(numel - length) * run // (RUNS - 1) for run in range(RUNS)]
    # Blocks of gradients with a scale each are cut nowhere.
    return [slice(start - start % BLOCK, start - start % BLOCK + length) for start in starts]


def _casts(
    kernels: Kernels,
    param: AdamParam,
    table: AdamTable,
    values: Sequence[Tensor],
    old_master: Tensor,
    start: int,
) -> Iterator[StateCast]:
    payloads = state_payloads(kernels, param, table, values, start)
    model_scale, *scales = table.scales[param.row].unbind()
    before = (old_master, None, None)
    for kind, value, payload, scale, state, old in zip(
        STATE_KINDS, values, payloads, scales, param.states, before, strict=True
    ):
        yield kind, value, ScaledTensor(payload, scale, state.format), old
    if param.model_param is not None:
        fmt = param.model_param.format
        payload = kernels.cast(values[0], model_scale, fmt)
        yield "weight", values[0], ScaledTensor(payload, model_scale, fmt), None


def _values(kernels: Kernels, stored: ScaledTensor, block: slice) -> Tensor:
    values = kernels.dequantize(stored.elements(block.start, block.stop)).view(-1)
    # An fp32 payload dequantizes to itself, and the arithmetic works in place.
    return values.clone() if stored.format == FP32 else values
