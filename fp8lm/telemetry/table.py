"""Statistics of many tensors, added up on the device and shared by all ranks in one exchange.

A row is a tensor: (layer, kind). All ranks have the same rows, those of other pipeline stages too;
what a rank does not hold it leaves at zero. Ranks that hold the same tensor, or the same weight's
shards, add to the same row, so shares and ratios are those of the logical tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm import Wire, WireCounter, max_over_group
from fp8lm.telemetry.statistics import MAXIMA, SUMS, statistics_of

Row = tuple[str, str]
Statistics = Mapping[Row, Mapping[str, float]]
PREFIX = "fp8_stats"  # of the keys of metrics.jsonl
_WIRE = "statistics"


class StatisticsTable:
    """Sums and maxima of `rows` (see `statistics.measure`), on `device`."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self.rows = tuple(rows)
        self._number = {row: number for number, row in enumerate(self.rows)}
        self._sums = torch.zeros(len(rows), len(SUMS), dtype=torch.float64, device=device)
        self._maxima = torch.zeros(len(rows), len(MAXIMA), device=device)
        self._wire = Wire(_WIRE, "fp32", WireCounter((_WIRE,)))

    def add(self, row: Row, measured: tuple[Tensor, Tensor]) -> None:
        """Add what `measure` has returned; KeyError if there is no such row."""
        number, (sums, maxima) = self._number[row], measured
        self._sums[number] += sums
        self._maxima[number] = torch.maximum(self._maxima[number], maxima)

    def collect(self, group: dist.ProcessGroup) -> Statistics:
        """Statistics of all ranks of `group`, of rows that were observed; then starts over.

        A collective, after which all ranks hold the same numbers; waits for the device.
        """
        dist.all_reduce(self._sums, group=group)
        maxima = max_over_group(self._maxima, group, self._wire).wait()
        each = zip(self.rows, self._sums.tolist(), maxima.tolist(), strict=True)
        statistics = {row: statistics_of(*measured) for row, *measured in each}
        self._sums.zero_()
        self._maxima.zero_()
        return {row: values for row, values in statistics.items() if values}


def as_metrics(statistics: Statistics, in_bf16: Collection[str] | None = None) -> dict[str, float]:
    """`statistics` under the keys of metrics.jsonl, to six digits.

    `in_bf16`: the layers that a guard has moved.
    """
    values = {
        f"{PREFIX}/{layer}/{kind}/{name}": float(f"{value:.6g}")
        for (layer, kind), own in statistics.items()
        for name, value in own.items()
    }
    if in_bf16 is not None:
        values[f"{PREFIX}/layers_in_bf16"] = len(in_bf16)
    return values


def row_of(key: str) -> tuple[Row, str] | None:
    """Row and statistic of a key of metrics.jsonl; None for another key."""
    parts = key.split("/")
    if len(parts) != 4 or parts[0] != PREFIX:
        return None
    return (parts[1], parts[2]), parts[3]


def statistics_in(metrics: Mapping[str, float | None]) -> Statistics:
    """The statistics in a line of metrics.jsonl."""
    found: dict[Row, dict[str, float]] = {}
    for key, value in metrics.items():
        named = row_of(key)
        if named is not None and value is not None:
            row, statistic = named
            found.setdefault(row, {})[statistic] = value
    return found
