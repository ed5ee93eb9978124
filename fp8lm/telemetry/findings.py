"""What is wrong with a run's tensors, from the statistics of one step: layer, kind, cause, cure.

    dead          nearly all zeros
    saturated     values beyond what the format holds with its scale, which does not follow them
    out of range  its scale keeps the largest value far below the format's: bits are wasted
    underflow     a large share becomes zero
    noisy         the cast's signal-to-noise ratio is far below the format's
    large         many times the same tensor in the other layers
    outliers      a few values (a channel, a token) are far larger than the rest
    lost          updates or additions that leave the stored value as it was

A tensor is compared with those of the same kind in the same place of all other layers, so a
property that all of them share is no finding.
"""

from __future__ import annotations

import re
import statistics as numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fp8lm.layers.quantizer import TENSOR_KINDS
from fp8lm.telemetry.table import Row, Statistics

_STATES = ("main_grad", "exp_avg")
_GUARD = "precision.guard.action=bf16"
_OUTLIERS = f"{_GUARD} precision.guard.max_kurtosis=100"
_FEWEST_PEERS = 3


@dataclass(frozen=True)
class Finding:
    """`severity` is a factor beyond the bound, to sort by; `key`: what to change in the config."""

    layer: str
    kind: str
    statistic: str
    value: float
    severity: float
    sentence: str
    key: str


@dataclass(frozen=True)
class _Rule:
    """A bound on `statistic` of tensors of `kinds`; `below`: it is a least value."""

    statistic: str
    kinds: Sequence[str]
    bound: float
    sentence: str
    key: str
    below: bool = False
    to_peers: bool = False  # the bound is on the ratio to the other layers' median
    least: float = 0.0  # with `to_peers`: nothing below it is a finding

    def excess(self, value: float, typical: float | None) -> float | None:
        """How far `value` is beyond the bound (more than 1), or None."""
        bound = self.bound
        if self.to_peers:
            if typical is None or typical <= 0.0 or value < self.least:
                return None
            bound *= typical
        beyond = bound / max(value, 1e-30) if self.below else value / bound
        return beyond if beyond > 1.0 else None


_RULES = (
    _Rule(
        "sparsity",
        ("input", "grad_output", "main_grad"),
        0.999,
        "{value:.2%} of its values are zero: the layer is dead, or nothing reaches it",
        "optimizer.lr, model.init_method_std",
    ),
    _Rule(
        "saturation",
        (*TENSOR_KINDS, *_STATES, "exp_avg_sq", "master"),
        1e-4,
        "{value:.3%} of its values are beyond what the format holds with its scale of {scale:g}: "
        "the scale does not follow the tensor",
        _GUARD,
    ),
    _Rule(
        "underflow",
        TENSOR_KINDS,
        0.1,
        "{value:.1%} of its values become zero in the cast: they are too small beside the largest",
        _GUARD,
    ),
    _Rule(
        "snr",
        TENSOR_KINDS,
        20.0,
        "its cast keeps {value:.1f} dB, where FP8 keeps 25 to 31: its values span more than the "
        "format, or its scale does not fit",
        _GUARD,
        below=True,
    ),
    _Rule(
        "snr",
        _STATES,
        15.0,
        "its cast keeps {value:.1f} dB, where FP8 keeps 31",
        "precision.exp_avg_dtype, precision.main_grads_dtype",
        below=True,
    ),
    _Rule(
        "amax",
        (*TENSOR_KINDS, "main_grad"),
        64.0,
        "its largest value, {value:.3g}, is {ratio:.0f} times that of the same tensor in the other "
        "layers",
        "optimizer.clip_grad, model.init_method_std",
        to_peers=True,
    ),
    _Rule(
        "kurtosis",
        ("input", "weight"),
        5.0,
        "its kurtosis is {value:.0f} (3: a normal distribution), {ratio:.0f} times that of the "
        "other layers: a few values are far larger than the rest",
        _OUTLIERS,
        to_peers=True,
        least=30.0,
    ),
    _Rule(
        "kurtosis",
        ("input", "weight"),
        1000.0,
        "its kurtosis is {value:.0f} (3: a normal distribution): a few values are far larger than "
        "the rest",
        _OUTLIERS,
    ),
    _Rule(
        "lost",
        ("main_grad",),
        0.5,
        "{value:.0%} of the additions of a micro-batch leave the sum as it was: the gradient "
        "shrinks",
        "precision.main_grads_dtype=fp8_e2m5",
    ),
)
_LOST_UPDATES = _Rule(
    "lost",
    ("master",),
    0.5,
    "{value:.0%} of the updates leave the stored weight as it was",
    "precision.master_rounding=stochastic",
)


def find(statistics: Statistics, *, stochastic_master: bool = True) -> list[Finding]:
    """What is beyond its bound, the worst first, one finding per tensor and statistic.

    With `stochastic_master` a weight that stays as it was is no loss: it moves as far on average.
    """
    rules = _RULES if stochastic_master else (*_RULES, _LOST_UPDATES)
    found: dict[tuple[str, str, str], Finding] = {}
    for rule in rules:
        for finding in _apply(rule, statistics):
            key = finding.layer, finding.kind, finding.statistic
            if key not in found or finding.severity > found[key].severity:
                found[key] = finding
    return sorted(found.values(), key=lambda finding: -finding.severity)


def _apply(rule: _Rule, statistics: Statistics) -> Iterator[Finding]:
    typical = _typical(statistics, rule.statistic)
    for (layer, kind), values in statistics.items():
        if kind not in rule.kinds or rule.statistic not in values:
            continue
        value, of_others = values[rule.statistic], typical(layer, kind)
        severity = rule.excess(value, of_others)
        if severity is not None:
            ratio = value / of_others if of_others else 0.0
            sentence = rule.sentence.format(value=value, ratio=ratio, scale=values.get("scale", 1))
            yield Finding(layer, kind, rule.statistic, value, severity, sentence, rule.key)


def _typical(statistics: Statistics, statistic: str) -> Callable[[str, str], float | None]:
    """The median of a statistic over the layers in the same place; None for too few of them."""
    groups: dict[Row, list[float]] = {}
    for (layer, kind), values in statistics.items():
        if statistic in values:
            groups.setdefault((place(layer), kind), []).append(values[statistic])

    def median(layer: str, kind: str) -> float | None:
        peers = groups.get((place(layer), kind), [])
        return numbers.median_low(peers) if len(peers) >= _FEWEST_PEERS else None

    return median


def place(layer: str) -> str:
    """`layer` without the numbers of transformer layers: what several layers have in common."""
    return re.sub(r"\.\d+\.", ".*.", layer)
