"""Which layers and tensors suffer from FP8: statistics by place, depth and time.

python tools/compare_layers.py o3=runs/a [bf16=runs/b ...] [--json layers.json]
    [--over-time time.png] [--by-depth depth.png]

The runs have been trained with logging.fp8_stats_interval; one in BF16 with
logging.fp8_stats_what_if=true as well. A place is what layers of the same kind have in common, such
as mlp.linear_fc2. Printed and drawn by depth is the mean of the last quarter of the reports; over
time the median over the layers of a place is drawn.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from reporting.figures import LOGARITHMIC
from reporting.runs import HeatMap, read_run

from fp8lm.arguments import file_to_write, path_text
from fp8lm.data.files import write_aside
from fp8lm.layers.quantizer import TENSOR_KINDS
from fp8lm.pictures import picture_path, save_figure
from fp8lm.planner.describe import aligned
from fp8lm.runtime.errors import CommandParser, InputError, run_command
from fp8lm.telemetry.findings import place

STATISTICS = ("snr", "underflow", "kurtosis", "sparsity", "amax")
DRAWN = ("snr", "underflow", "kurtosis", "amax")
SHARES = ("underflow", "sparsity")
LEAST_SHARE = 1e-6  # what a logarithmic axis starts with
MOST_REPORTS = 10_000
IN_LAYERS = "decoder.layers.*."


@dataclass(frozen=True)
class Series:
    """A statistic of one tensor kind in one place: `values` [layers, reports] at `iterations`."""

    iterations: list[int]
    values: np.ndarray

    @property
    def over_time(self) -> np.ndarray:
        """The median over layers, by report."""
        return _without_nan(np.nanmedian, self.values, 0)

    @property
    def by_layer(self) -> np.ndarray:
        """The mean of the last quarter of the reports, by layer."""
        return _without_nan(np.nanmean, self.values[:, -max(1, self.values.shape[1] // 4) :], 1)


Found = dict[tuple[str, str, str], Series]  # by place, kind and statistic


def main(argv: list[str]) -> None:
    """Read, print, and write what was asked for."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=path_text, nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--json", type=file_to_write, help="write the numbers to this file")
    parser.add_argument("--over-time", type=picture_path, help="draw statistics over iterations")
    parser.add_argument("--by-depth", type=picture_path, help="draw statistics over layers")
    options = parser.parse_args(argv)
    runs = dict(read_argument(argument) for argument in options.runs)
    for name, found in runs.items():
        print(f"{name}\n{as_table(found)}\n")
    if options.json:
        write_aside(options.json, json.dumps(as_numbers(runs)) + "\n")
    if options.over_time:
        plot(runs, options.over_time, over_time=True)
    if options.by_depth:
        plot(runs, options.by_depth, over_time=False)


def read_argument(argument: str) -> tuple[str, Found]:
    """Name and statistics of NAME=FOLDER; InputError if there are none."""
    name, separator, folder = argument.partition("=")
    if not separator:
        raise InputError(f"{argument}: expected NAME=FOLDER")
    found = statistics_by_place(read_run(Path(folder), MOST_REPORTS).heat)
    if not found:
        raise InputError(f"{folder} has no statistics: train with logging.fp8_stats_interval")
    return name, found


def statistics_by_place(heat: Mapping[tuple[str, str], HeatMap]) -> Found:
    """Statistics of the operands of GEMMs within transformer layers."""
    found: Found = {}
    for (kind, statistic), own in heat.items():
        if kind not in TENSOR_KINDS or statistic not in STATISTICS:
            continue
        places = [place(layer) for layer in own.layers]
        for each in dict.fromkeys(places):
            if each.startswith(IN_LAYERS):
                rows = [row for row, name in enumerate(places) if name == each]
                series = Series(own.iterations, own.values[rows])
                found[each.removeprefix(IN_LAYERS), kind, statistic] = series
    return found


def as_table(found: Found) -> str:
    """A row per place and kind: means over layers, and SNR of the first and the last layer."""
    rows = [["place", "tensor", *STATISTICS, "snr, first", "snr, last"]]
    kinds = dict.fromkeys((where, kind) for where, kind, _ in found)
    places = list(dict.fromkeys(where for where, _ in kinds))
    for where, kind in sorted(kinds, key=lambda row: places.index(row[0])):
        own = [found.get((where, kind, statistic)) for statistic in STATISTICS]
        means = [np.nan if series is None else float(series.by_layer.mean()) for series in own]
        snr = np.array([np.nan]) if own[0] is None else own[0].by_layer
        ends = (f"{value:.2f}" for value in (snr[0], snr[-1]))
        rows.append([where, kind, *map(_text, STATISTICS, means), *ends])
    return "\n".join(aligned(rows, left={0, 1}))


def _text(statistic: str, value: float) -> str:
    return f"{value:.3%}" if statistic in SHARES else f"{value:.3g}"


def as_numbers(runs: Mapping[str, Found]) -> list[dict[str, object]]:
    """A record for each run, place, kind and statistic; six digits, null where there is none."""
    return [
        {
            "run": name,
            "place": where,
            "kind": kind,
            "statistic": statistic,
            "iterations": series.iterations,
            "over_time": _numbers(series.over_time),
            "by_layer": _numbers(series.by_layer),
        }
        for name, found in runs.items()
        for (where, kind, statistic), series in found.items()
    ]


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


def plot(runs: Mapping[str, Found], path: Path, *, over_time: bool) -> None:
    """Statistics from top to bottom, kinds from left to right; a colour per place."""
    from matplotlib.figure import Figure  # without a display, and half a second to import

    places = list(dict.fromkeys(where for found in runs.values() for where, _, _ in found))
    size = len(DRAWN), len(TENSOR_KINDS)
    figure = Figure(figsize=(12, 11))
    axes = figure.subplots(*size, squeeze=False, sharex=True)
    for statistic, row in zip(DRAWN, axes, strict=True):
        for kind, axis in zip(TENSOR_KINDS, row, strict=True):
            for line, (name, found) in zip(("-", "--", ":", "-."), runs.items(), strict=False):
                for number, where in enumerate(places):
                    series = found.get((where, kind, statistic))
                    if series is None:
                        continue
                    y = series.over_time if over_time else series.by_layer
                    y = np.maximum(y, LEAST_SHARE) if statistic in SHARES else y
                    x = series.iterations if over_time else range(len(y))
                    label = f"{where}, {name}"
                    axis.plot(x, y, line, color=f"C{number}", linewidth=1.2, label=label)
            if statistic in (*LOGARITHMIC, *SHARES):
                axis.set_yscale("log")
            axis.set_title(f"{statistic} of {kind}", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("iteration" if over_time else "layer")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(places), fontsize=8, loc="lower center")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save_figure(figure, path, dpi=90)


def _without_nan(function: Callable, values: np.ndarray, axis: int) -> np.ndarray:
    """`function` along `axis`, NaN where there is nothing but NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return function(values, axis=axis)


if __name__ == "__main__":
    sys.exit(run_command(main))
