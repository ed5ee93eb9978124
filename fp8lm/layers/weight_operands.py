"""The amax of weights that are stored in another format than their GEMM's: once per step.

Such a weight (presets te, o1 and o2) is cast to FP8 at every use, with one scale over the ranks
that hold its parts. All amaxes of a model travel in one exchange, and hold while no weight
changes: within `known_amaxes`. Outside of it every use finds its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from fp8lm.layers.edge import Partition
from fp8lm.layers.weight import GemmWeight, Weight


@contextmanager
def known_amaxes(weights: Iterable[Weight], partition: Partition) -> Iterator[None]:
    """Find the amaxes of all `weights` that need one; they must not change before the end."""
    cast = [weight for weight in weights if isinstance(weight, GemmWeight) and weight.is_recast]
    if not cast:
        yield
        return
    amaxes = partition.max(torch.stack([weight.local_amax() for weight in cast]))
    for weight, amax in zip(cast, amaxes.unbind(), strict=True):
        weight.known_amax = amax
    try:
        yield
    finally:
        for weight in cast:
            weight.known_amax = None
