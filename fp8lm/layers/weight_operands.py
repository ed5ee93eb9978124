"""The amax of weights that are stored in another format than their GEMM's: once per step.

Such a weight (presets te, o1 and o2) is cast to FP8 at every use, with one scale over the ranks
that hold its parts. All amaxes of a model travel in one exchange, and hold while no weight
changes: within `cached_weight_operands`. Outside of it every use finds its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from fp8lm.layers.param import Param, QuantizedParam
from fp8lm.layers.tp_context import TPContext


@contextmanager
def cached_weight_operands(weights: Iterable[Param], tp: TPContext) -> Iterator[None]:
    """Find the amaxes of all `weights` that need one; they must not change before the end."""
    cast = [
        weight for weight in weights if isinstance(weight, QuantizedParam) and weight.needs_cast
    ]
    if not cast:
        yield
        return
    amaxes = tp.max(torch.stack([weight.local_amax() for weight in cast]))
    for weight, amax in zip(cast, amaxes.unbind(), strict=True):
        weight.cached_amax = amax
    try:
        yield
    finally:
        for weight in cast:
            weight.cached_amax = None
