"""What a report needs of a run's folder, read in one pass with memory for a fixed number of steps.

Statistics of casts are kept as a matrix for each (kind, statistic), layers x columns of steps. When
there are too many columns, neighbours become one, which keeps the worse of the two values: a spike
of a single step stays visible.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fp8lm.config.yaml_format import read_mapping
from fp8lm.runtime.errors import InputError
from fp8lm.telemetry.table import PREFIX, Statistics, row_of, statistics_in

Points = Sequence[tuple[int, float]]
LOSS, VALIDATION = "lm loss", "lm loss validation"
CURVES = (
    LOSS,
    VALIDATION,
    "grad-norm",
    "tokens-per-second",
    "throughput",
    "memory/rss",
    "memory/gpu_peak",
    "skipped iterations",
    "fp8_stats/layers_in_bf16",
)
# Of statistics where less is worse.
LESS_IS_WORSE = ("snr",)
_PREFIX = f"{PREFIX}/"


@dataclass
class HeatMap:
    """`values` of one (kind, statistic): rows of `layers`, columns that start at `iterations`."""

    layers: list[str]
    iterations: list[int]
    values: np.ndarray

    def coarser(self, rows: int, columns: int, statistic: str) -> HeatMap:
        """At most `rows` x `columns` blocks of it, each with its worst value."""
        worst = np.fmin if statistic in LESS_IS_WORSE else np.fmax
        values = self.values
        sizes = [-(-size // most) for size, most in zip(values.shape, (rows, columns), strict=True)]
        for axis, size in enumerate(sizes):
            starts = np.arange(0, values.shape[axis], size)
            values = worst.reduceat(values, starts, axis=axis)
        return HeatMap(self.layers[:: sizes[0]], self.iterations[:: sizes[1]], values)


@dataclass
class Run:
    """One run: curves as (iteration, value) by key of metrics.jsonl, statistics, config."""

    folder: Path
    curves: dict[str, list[tuple[int, float]]]
    last: Mapping[str, Any]  # the last report of training
    heat: dict[tuple[str, str], HeatMap]
    statistics: Statistics  # the last
    statistics_at: int | None
    config: dict[str, Any]

    @property
    def stochastic_master(self) -> bool:
        """Whether master weights are rounded stochastically."""
        return self.config.get("precision", {}).get("master_rounding") != "nearest"


class Columns:
    """Statistics of steps; neighbours are merged when there are twice `limit` columns."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._iterations: list[int] = []
        self._columns: list[np.ndarray] = []
        self._rows: dict[str, int] = {}  # by key of metrics.jsonl

    def add(self, iteration: int, line: Mapping[str, Any]) -> bool:
        """Add those in a line of metrics.jsonl, if there are any; what a step lacks is NaN."""
        values = {key: value for key, value in line.items() if key.startswith(_PREFIX)}
        if not values:
            return False
        for key in values:
            self._rows.setdefault(key, len(self._rows))
        column = np.full(len(self._rows), np.nan, np.float32)
        column[[self._rows[key] for key in values]] = list(values.values())
        self._iterations.append(iteration)
        self._columns.append(column)
        if len(self._columns) >= 2 * self.limit:
            self._merge()
        return True

    def heat(self) -> dict[tuple[str, str], HeatMap]:
        """Layers x columns by kind and statistic."""
        matrix = self._matrix()
        named = {number: row_of(key) for key, number in self._rows.items()}
        rows: dict[tuple[str, str], dict[str, int]] = {}
        for number, found in named.items():
            if found is not None:
                (layer, kind), name = found
                rows.setdefault((kind, name), {})[layer] = number
        return {which: self._heat_of(own, matrix) for which, own in rows.items()}

    def _heat_of(self, rows: Mapping[str, int], matrix: np.ndarray) -> HeatMap:
        layers = sorted(rows, key=depth)
        return HeatMap(layers, self._iterations, matrix[:, [rows[layer] for layer in layers]].T)

    def _merge(self) -> None:
        """Every two columns become one, of their worse values."""
        matrix = self._matrix()
        less = np.array([key.rpartition("/")[2] in LESS_IS_WORSE for key in self._rows])
        first, second = matrix[::2], matrix[1::2]
        self._columns = [*np.where(less, np.fmin(first, second), np.fmax(first, second))]
        self._iterations = self._iterations[::2]

    def _matrix(self) -> np.ndarray:
        """[columns, rows]."""
        matrix = np.full((len(self._columns), len(self._rows)), np.nan, np.float32)
        for number, column in enumerate(self._columns):
            matrix[number, : len(column)] = column
        return matrix


def depth(layer: str) -> list[int]:
    """A key that sorts layers by their number, those of one in the order of the model."""
    return [int(part) for part in layer.split(".") if part.isdecimal()]


def read_run(folder: Path, columns: int) -> Run:
    """The run in `folder`, its statistics in at most twice `columns` columns.

    InputError if there are no metrics.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path} does not exist: train with logging.dir={folder}")
    curves: dict[str, list[tuple[int, float]]] = {key: [] for key in CURVES}
    last: Mapping[str, Any] = {}
    merged, at = Columns(columns), None
    observed: Mapping[str, Any] = {}
    for line in read_lines(path):
        iteration = int(line["iteration"])
        for key in CURVES:
            if isinstance(line.get(key), int | float):
                curves[key].append((iteration, line[key]))
        last = line if LOSS in line else last
        if merged.add(iteration, line):
            observed, at = line, iteration
    if not last:
        raise InputError(f"{path} has no report of training yet")
    return Run(folder, curves, last, merged.heat(), statistics_in(observed), at, _config(folder))


def read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a metrics.jsonl; a last line that is not finished is passed over."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                int(line["iteration"])
            except (ValueError, KeyError, TypeError):
                if not text.endswith("\n"):
                    return
                raise InputError(
                    f"{path}, line {number}: no report of a run: {text!r:.40}"
                ) from None
            yield line


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    return read_mapping(path) if path.is_file() else {}
