"""Weight operands of GEMMs, computed once per step.

A weight stored in another format than its GEMM's (presets te, o1 and o2) is cast to FP8 with one
scale over the ranks that hold its parts: the amaxes of all such weights travel in one exchange.
With `precision.cache_weight_operands` the cast payload and the transposed one stay for the step as
well, in FP8 one byte per parameter each, and every further micro-batch reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fp8lm.layers.param import OperandCache, Param, QuantizedParam
from fp8lm.layers.tp_context import TPContext


@contextmanager
def cached_weight_operands(weights: Iterable[Param], tp: TPContext) -> Iterator[None]:
    """Cache amaxes, and operands if configured, of `weights`, which must not change meanwhile."""
    matrices = [weight for weight in weights if isinstance(weight, QuantizedParam)]
    cast = [weight for weight in matrices if weight.needs_cast]
    amaxes: dict[QuantizedParam, Tensor] = {}
    if cast:
        shared = tp.max(torch.stack([weight.local_amax() for weight in cast]))
        amaxes = dict(zip(cast, shared.unbind(), strict=True))
    inverses = _inverse_scales(matrices)
    for weight in matrices:
        weight.cache = OperandCache(
            amaxes.get(weight), inverses.get(weight), keep=weight.cache_operands
        )
    try:
        yield
    finally:
        for weight in matrices:
            weight.cache = None


def _inverse_scales(weights: list[QuantizedParam]) -> dict[QuantizedParam, Tensor]:
    """Those of weights that GEMMs read as they are stored, in one operation for all."""
    read = [weight for weight in weights if weight.spec.format.scaled and not weight.needs_cast]
    if not read:
        return {}
    inverses = torch.stack([weight.scale for weight in read]).reciprocal()
    return dict(zip(read, inverses.unbind(), strict=True))
