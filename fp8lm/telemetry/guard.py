"""The guard of FP8 GEMMs: which layers run in BF16 for now, decided from statistics.

    within bounds      -> a layer stays as it is
    out of bounds, `patience` statistics in a row       -> a warning, or the layer moves to BF16
    in BF16, within bounds `return_after` in a row      -> the layer returns

Statistics are the same on all ranks, and so are the decisions. Nothing else enters them, so that a
resumed run decides as the one that was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fp8lm.config.guard import GuardConfig
from fp8lm.layers.linear import Linear
from fp8lm.layers.quantizer import TENSOR_KINDS
from fp8lm.telemetry.table import Statistics


class Guard:
    """Decides for all layers of the model, and moves `linears`, those of this rank."""

    def __init__(self, config: GuardConfig, linears: Mapping[str, Linear]) -> None:
        self.config = config
        self._linears = dict(linears)
        self._outside: dict[str, int] = {}  # statistics in a row, by layer
        self._within: dict[str, int] = {}  # the same of the layers that run in BF16

    @property
    def in_bf16(self) -> frozenset[str]:
        """Layers that the guard has moved."""
        return frozenset(self._within)

    @property
    def state(self) -> dict[str, Any]:
        """For a checkpoint; the same on all ranks."""
        return {"outside": dict(self._outside), "within": dict(self._within)}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Decide on from `state` (None: from the beginning); layers move as it says."""
        state = state or {}
        self._outside = dict(state.get("outside", {}))
        self._within = dict(state.get("within", {})) if self.config.action == "bf16" else {}
        self._move()

    def check(self, statistics: Statistics) -> list[str]:
        """Act on the statistics of one step; what was decided, a line each."""
        breaches = find_breaches(statistics, self.config)
        layers = dict.fromkeys(layer for layer, kind in statistics if kind in TENSOR_KINDS)
        said = [line for layer in layers for line in self._check(layer, breaches.get(layer, []))]
        self._move()
        return said

    def _check(self, layer: str, breaches: list[str]) -> list[str]:
        if layer in self._within:
            return self._consider_return(layer, breaches)
        if not breaches:
            self._outside.pop(layer, None)
            return []
        self._outside[layer] = self._outside.get(layer, 0) + 1
        if self._outside[layer] != self.config.patience:  # once, until it is within bounds again
            return []
        reason = f"{layer}: {'; '.join(breaches)}"
        if self.config.action == "warn":
            return [f" warning: {reason}"]
        self._within[layer] = self._outside.pop(layer) * 0
        return [f" warning: {reason}: its GEMMs run in BF16 from the next step on"]

    def _consider_return(self, layer: str, breaches: list[str]) -> list[str]:
        self._within[layer] = 0 if breaches else self._within[layer] + 1
        if self.config.return_after is None or self._within[layer] < self.config.return_after:
            return []
        steady = self._within.pop(layer)
        return [f" {layer}: within the bounds {steady} times in a row: its GEMMs return to FP8"]

    def _move(self) -> None:
        for name, linear in self._linears.items():
            if name in self._within:
                linear.fall_back()
            else:
                linear.restore()


def find_breaches(statistics: Statistics, config: GuardConfig) -> dict[str, list[str]]:
    """What is outside the bounds, in words, by layer; operands of GEMMs only."""
    found: dict[str, list[str]] = {}
    for (layer, kind), values in statistics.items():
        if kind in TENSOR_KINDS:
            found.setdefault(layer, []).extend(_breaches(kind, values, config))
    return {layer: breaches for layer, breaches in found.items() if breaches}


def _breaches(kind: str, values: Mapping[str, float], config: GuardConfig) -> list[str]:
    bounds = (
        ("underflow", config.max_underflow, "max_underflow"),
        ("saturation", config.max_saturation, "max_saturation"),
        ("kurtosis", config.max_kurtosis, "max_kurtosis"),
    )
    above = [
        f"{statistic} of its {kind} is {values[statistic]:.3g}, above precision.guard.{key}={most}"
        for statistic, most, key in bounds
        if most is not None and values.get(statistic, 0.0) > most
    ]
    least = config.min_snr
    if least is not None and values.get("snr", least) < least:
        above.append(f"snr of its {kind} is {values['snr']:.3g} dB, below precision.guard.min_snr")
    return above
