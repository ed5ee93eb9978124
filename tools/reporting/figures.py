"""Pictures of a report as SVG, in which heat maps are embedded as pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from reporting.runs import LESS_IS_WORSE, HeatMap, Points

MOST_POINTS = 1000  # of a curve
HIGHEST, WIDEST = 200, 160  # rows and columns of a heat map
MOST_CELLS = HIGHEST * WIDEST
T = TypeVar("T")
# Limits of the colours, good first and bad last; None: what is there.
COLOURS: dict[str, tuple[float | None, float | None]] = {
    "snr": (32.0, 10.0),
    "underflow": (0.0, 0.2),
    "saturation": (0.0, 1e-3),
    "lost": (0.0, 1.0),
    "kurtosis": (None, None),
    "amax": (None, None),
}
LOGARITHMIC = ("kurtosis", "amax")
SETTINGS: Any = {"svg.hashsalt": "report", "svg.fonttype": "none", "font.size": 9}


def curves(
    of_names: Mapping[str, Sequence[Points]], label: str, *, logarithmic: bool = False
) -> bytes:
    """Curves by name: one colour each, one line per seed."""
    with figure(8.0, 2.8) as (canvas, axis):
        for index, (name, seeds) in enumerate(of_names.items()):
            for number, points in enumerate(seeds):
                x, y = zip(*thinned(points), strict=True)
                named = {"label": name} if number == 0 else {}
                axis.plot(x, y, color=f"C{index}", linewidth=1.0, alpha=0.8, **named)
        if logarithmic:
            axis.set_yscale("log")
        _finish(axis, label)
    return canvas.getvalue()


def gaps(
    of_names: Mapping[str, Points], spread: Sequence[tuple[int, float, float]], label: str
) -> bytes:
    """Gaps to the baseline over iterations; `spread` is (iteration, least, most) of its seeds."""
    with figure(8.0, 2.8) as (canvas, axis):
        axis.axhline(0.0, color="C0", linewidth=0.8)
        if spread:
            x, low, high = zip(*spread, strict=True)
            axis.fill_between(x, low, high, color="C0", alpha=0.2, label="seeds of the baseline")
        for index, (name, points) in enumerate(of_names.items(), start=1):
            x, y = zip(*thinned(points), strict=True)
            axis.plot(x, y, color=f"C{index}", linewidth=1.2, label=name)
        _finish(axis, label)
    return canvas.getvalue()


def heat_map(heat: HeatMap, statistic: str, title: str, cells: int = MOST_CELLS) -> bytes:
    """Layers from top to bottom, steps from left to right; red is bad.

    At most `cells` are drawn, and none is narrower than a pixel: no bad value is lost on the way.
    """
    rows = min(len(heat.layers), HIGHEST, cells)
    heat = heat.coarser(rows, min(WIDEST, cells // rows), statistic)
    values = heat.values
    good, bad = COLOURS[statistic]
    options: dict[str, Any] = {"cmap": "RdYlGn_r", "vmin": good, "vmax": bad}
    if statistic in LESS_IS_WORSE:
        options |= {"cmap": "RdYlGn", "vmin": bad, "vmax": good}
    if statistic in LOGARITHMIC:
        values = np.log10(np.maximum(values, 1e-30))
        options["cmap"] = "viridis"
    height = 1.0 + min(5.0, 0.1 * len(heat.layers))
    with figure(6.5, height) as (canvas, axis):
        axis.set_title(title)
        image = axis.imshow(values, aspect="auto", interpolation="nearest", **options)
        shown = range(0, len(heat.layers), max(1, -(-len(heat.layers) // 24)))
        axis.set_yticks(shown, [short(heat.layers[row]) for row in shown], fontsize=7)
        ticks = np.unique(np.linspace(0, len(heat.iterations) - 1, 7).astype(int))
        axis.set_xticks(ticks, [str(heat.iterations[tick]) for tick in ticks])
        axis.set_xlabel("iteration")
        name = f"log10 {statistic}" if statistic in LOGARITHMIC else statistic
        axis.figure.colorbar(image, ax=axis, label=name, pad=0.01)
    return canvas.getvalue()


def bars(of_names: Mapping[str, Mapping[str, float]], label: str) -> bytes:
    """Stacked bars, one per name."""
    parts = dict.fromkeys(part for own in of_names.values() for part in own)
    with figure(8.0, 0.9 + 0.35 * len(of_names)) as (canvas, axis):
        names, left = list(of_names), np.zeros(len(of_names))
        for part in parts:
            sizes = np.array([own.get(part, 0.0) for own in of_names.values()])
            if sizes.any():
                axis.barh(names, sizes, left=left, label=part, height=0.6)
                left = left + sizes
        axis.invert_yaxis()
        axis.set_xlabel(label)
        if left.any():
            axis.legend(fontsize=7, ncols=3, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return canvas.getvalue()


def short(layer: str) -> str:
    """A layer's name without what all share."""
    return layer.removeprefix("decoder.layers.")


def thinned(points: Sequence[T]) -> Sequence[T]:
    """At most about `MOST_POINTS` of them, evenly, the first and the last among them."""
    step = max(1, -(-len(points) // MOST_POINTS))
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[BytesIO, Any]]:
    """A canvas and its axis, drawn to the canvas at the end of the context."""
    drawn = Figure(figsize=(width, height))
    canvas = BytesIO()
    yield canvas, drawn.subplots()
    with matplotlib.rc_context(SETTINGS):
        drawn.savefig(canvas, format="svg", bbox_inches="tight", metadata={"Date": None})


def _finish(axis: Any, label: str) -> None:
    axis.set_xlabel("iteration")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
