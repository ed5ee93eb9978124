"""Weight operands of GEMMs, computed once per step.

A weight stored in another format than its GEMM's (presets te, o1 and o2) is cast to FP8 with one
scale over the ranks that hold its parts: the amaxes of all such weights travel in one exchange.
The cast payload stays for the step, one byte per parameter, and every further micro-batch reads it;
with `precision.cache_weight_operands` the transposed one as well, on a GPU another byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fp8lm.layers.param import OperandCache, Param, QuantizedParam
from fp8lm.layers.tp_context import TPContext


@contextmanager
def cached_weight_operands(weights: Iterable[Param], tp: TPContext) -> Iterator[None]:
    """Cache amaxes, and operands if configured, of `weights`, which must not change meanwhile."""
    with weight_operands(weights, tp) as cache:
        cache()
        yield


@contextmanager
def weight_operands(weights: Iterable[Param], tp: TPContext) -> Iterator[Callable[[], None]]:
    """The same from when the function that this yields is called, a collective of `tp`."""
    matrices = [weight for weight in weights if isinstance(weight, QuantizedParam)]

    def cache() -> None:
        amaxes = _shared_amaxes([weight for weight in matrices if weight.needs_cast], tp)
        inverses = _inverse_scales(matrices)
        for weight in matrices:
            weight.cache = OperandCache(
                amaxes.get(weight), inverses.get(weight), keep=weight.cache_operands
            )

    try:
        yield cache
    finally:
        for weight in matrices:
            weight.cache = None


def _shared_amaxes(cast: list[QuantizedParam], tp: TPContext) -> dict[QuantizedParam, Tensor]:
    """Amaxes of the `cast` weights over all ranks, in one exchange; blocks share none."""
    local = {weight: amax for weight in cast if (amax := weight.local_amax()) is not None}
    if not local:
        return {}
    shared = tp.max(torch.cat([amax.flatten() for amax in local.values()]))
    parts = shared.split([amax.numel() for amax in local.values()])
    return {
        weight: part.view(amax.shape)
        for (weight, amax), part in zip(local.items(), parts, strict=True)
    }


def _inverse_scales(weights: list[QuantizedParam]) -> dict[QuantizedParam, Tensor]:
    """Those of weights that GEMMs read as they are stored, in one operation for all."""
    read = [weight for weight in weights if weight.spec.format.scaled and not weight.needs_cast]
    if not read:
        return {}
    inverses = torch.stack([weight.scale for weight in read]).reciprocal()
    return dict(zip(read, inverses.unbind(), strict=True))
