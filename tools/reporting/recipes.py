"""Tables and pictures of recipes that were trained beside each other."""

from __future__ import annotations

import statistics
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare_runs import describe_gap, read_reports

from fp8lm.pictures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OPERANDS = ("input", "weight", "grad_output")
Summary = dict[str, dict[str, Any]]


def operand_snr(files: list[Path]) -> dict[str, float]:
    """SNR in dB by kind of operand: the median over layers of the last report, mean over `files`.

    Empty where no statistics were reported; activations in BF16 have none.
    """
    of_files: dict[str, list[float]] = {kind: [] for kind in OPERANDS}
    for file in files:
        reported = (line for line in read_reports(file) if any(map(_is_snr, line)))
        last: dict[str, float] = dict(*deque(reported, maxlen=1))
        for kind, found in of_files.items():
            layers = [last[key] for key in last if _is_snr(key) and key.split("/")[2] == kind]
            found += [statistics.median(layers)] if layers else []
    return {kind: statistics.fmean(found) for kind, found in of_files.items() if found}


def _is_snr(key: str) -> bool:
    return key.startswith("fp8_stats/") and key.endswith("/snr")


def print_costs(summary: Summary) -> None:
    """A table of time, bytes on wires and, where it was reported, what `operand_snr` found."""
    width = max(len(name) for name in summary) + 2
    kinds = [kind for kind in OPERANDS if any(row["SNR dB"] for row in summary.values())]
    heads = ["s/iteration", "B/wires", *(f"dB of {kind}" for kind in kinds)]
    print(f"\n{'':{width}}" + "".join(f"{head:>18}" for head in heads))
    for name, row in summary.items():
        cells = [f"{row['median seconds per iteration']:.3f}"]
        cells.append(f"{row['bytes on wires per linear parameter']:.4g}")
        found = (row["SNR dB"].get(kind) for kind in kinds)
        cells += ["" if value is None else f"{value:.1f}" for value in found]
        print(f"{name:{width}}" + "".join(f"{cell:>18}" for cell in cells))
    print("B/wires: of a linear layer's parameter in a step over data-parallel ranks with ZeRO")


def print_gaps_over_time(summary: Summary) -> None:
    """A table of the gaps at every validation after the first steps."""
    base, *others = summary
    width = max(len(name) for name in (*others, f"above {base}")) + 2
    for number, name in enumerate(others):
        points = [point for point in summary[name]["gap % over time"] if point["iteration"]]
        if number == 0:
            heads = "".join(f"{point['iteration']:>16}" for point in points)
            print(f"\n{f'above {base}':{width}}{heads}")
        print(f"{name:{width}}" + "".join(f"{describe_gap(point):>16}" for point in points))


def plot_gaps(summary: Summary, path: Path) -> None:
    """Gaps of all recipes to the first, at the end and over time."""
    from matplotlib.figure import Figure  # without a display, and half a second to import

    figure = Figure(figsize=(14, max(4.0, 1.2 + 0.5 * len(summary))), layout="tight")
    last, over_time = figure.subplots(1, 2)
    plot_last_gaps(summary, last)
    plot_gaps_over_time(summary, over_time)
    save_figure(figure, path, dpi=120)


def plot_last_gaps(summary: Summary, axis: Axes) -> None:
    """Of every recipe its seeds, their mean and its interval."""
    base, *others = summary
    for number, name in enumerate(others):
        row, height = summary[name], len(others) - 1 - number
        seeds = row["gap % by seed"] or [row["gap %"]]
        axis.plot(seeds, [height] * len(seeds), "o", color="0.6", markersize=4)
        style: dict[str, Any] = {"fmt": "D", "capsize": 4, "color": f"C{number}"}
        axis.errorbar(row["gap %"], height, xerr=row["gap % +-"] or 0.0, **style)
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(others)), list(reversed(others)))
    axis.set_xlabel(f"validation loss above {base} in %: seeds, mean, 95 % interval of the mean")
    axis.grid(alpha=0.3)


def plot_gaps_over_time(summary: Summary, axis: Axes) -> None:
    """Means with their intervals, beside each other where they would hide each other."""
    base, *others = summary
    for number, name in enumerate(others):
        points = [point for point in summary[name]["gap % over time"] if point["iteration"]]
        apart = 0.01 * (number - len(others) / 2) * summary[name]["iterations"]
        x = [point["iteration"] + apart for point in points]
        y = [point["gap %"] for point in points]
        intervals = [point["gap % +-"] or 0.0 for point in points]
        style: dict[str, Any] = {
            "marker": ".",
            "linewidth": 1,
            "elinewidth": 0.6,
            "color": f"C{number}",
        }
        axis.errorbar(x, y, yerr=intervals, label=name, **style)
    axis.axhline(0.0, color="black", linewidth=0.8)
    axis.set_xlabel("iteration")
    axis.set_ylabel(f"mean above {base} in %, 95 % interval")
    axis.grid(alpha=0.3)
    if others:
        axis.legend(fontsize=8, loc="upper left")
