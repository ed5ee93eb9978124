"""Estimates as a table, a column for each preset, and as a picture of stacked bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fp8lm.pictures import save_figure
from fp8lm.planner.describe import aligned
from fp8lm.planner.estimate import Estimate
from fp8lm.planner.tracing.roofline import GIGA

MS = 1e3
TIMES = {
    "kernels": "kernels",
    "tensor_parallel": "waiting for tensor-parallel ranks",
    "pipeline": "messages between stages",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "data_parallel": "waiting for data-parallel ranks",
    "reference": "reference model",
}
Number = Callable[[Estimate], float]


def table(estimates: Mapping[str, Estimate], baseline: str) -> str:
    """Memory, bytes on the wires and time; speed compared with the preset `baseline`."""
    rows: list[tuple[str, ...]] = [("", *estimates)]

    def row(label: str, form: str, number: Number) -> None:
        rows.append((label, *(form.format(number(of)) for of in estimates.values())))

    def rows_of(label: str, form: str, parts: Callable[[Estimate], Mapping[str, float]]) -> None:
        found = {preset: parts(of) for preset, of in estimates.items()}
        for name in next(iter(found.values())):
            values = [of[name] for of in found.values()]
            if any(values):
                rows.append((f"{label}: {name}", *map(form.format, values)))

    rows_of("GB", "{:.2f}", lambda of: _in_giga(of.fullest.components))
    row("GB on the fullest rank", "{:.1f}", lambda of: of.fullest.total / GIGA)
    row("GB on the emptiest rank", "{:.1f}", lambda of: of.least / GIGA)
    row("largest micro-batch that fits", "{}", lambda of: of.largest_micro_batch)
    rows_of("GB sent in a step", "{:.3g}", lambda of: _in_giga(of.most_sent))
    rows_of("ms", "{:.1f}", milliseconds)
    row("ms of a step", "{:.0f}", lambda of: MS * of.time.total)
    row("tokens per second and GPU", "{:.0f}", lambda of: of.tokens_per_second)
    row("MFU, % of the GEMMs' format", "{:.1f}", lambda of: 100 * of.mfu)
    time = estimates[baseline].time.total
    row(f"speed to {baseline}", "{:.2f}", lambda of: time / of.time.total)
    return "\n".join(aligned(rows, left={0}))


def milliseconds(estimate: Estimate) -> dict[str, float]:
    """The parts of a step's time, by what they are called here."""
    return {label: MS * getattr(estimate.time, part) for part, label in TIMES.items()}


def _in_giga(sizes: Mapping[str, float]) -> dict[str, float]:
    return {name: size / GIGA for name, size in sizes.items()}


def heading(estimate: Estimate) -> str:
    """What the table is of."""
    layout, batches = estimate.layout, estimate.batches
    dims, hardware = layout.dims, estimate.hardware
    parallel = layout.config.parallel
    sequence = " with SP" * parallel.sequence_parallel
    whole = "; attention over whole samples" * layout.config.separates_documents
    return (
        f"{dims.world_size} x {hardware.name} ({hardware.memory_gb:.0f} GB), TP {dims.tp}"
        f"{sequence}, PP {dims.pp}, DP {dims.dp}; {batches.num_microbatches} micro-batches of "
        f"{batches.micro_batch_size} a step; predicted, not measured{whole}"
    )


def plot(estimates: Mapping[str, Estimate], title: str, path: Path) -> None:
    """Memory of the fullest rank and time of a step, a stacked bar for each preset."""
    from matplotlib.figure import Figure  # without a display, and half a second to import

    figure = Figure(figsize=(13, 1.6 + 0.6 * len(estimates)))
    memory, time = figure.subplots(1, 2)
    first = next(iter(estimates.values()))
    components = {
        name: [of.fullest.components[name] / GIGA for of in estimates.values()]
        for name in first.fullest.components
    }
    times = {
        label: [getattr(of.time, part) for of in estimates.values()]
        for part, label in TIMES.items()
    }
    for axes, parts, unit in (
        (memory, components, "GB on the fullest rank"),
        (time, times, "predicted seconds of a step"),
    ):
        _stack(axes, list(estimates), parts)
        axes.set_xlabel(unit)
    room = first.hardware.memory_gb
    memory.axvline(room, color="black", linestyle="--", linewidth=1, label=f"{room:.0f} GB")
    for axes in (memory, time):
        axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=110, bbox_inches="tight")


def _stack(axes: object, names: list[str], parts: Mapping[str, list[float]]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    left = [0.0] * len(names)
    for number, (label, widths) in enumerate(parts.items()):
        if any(widths):
            axes.barh(names, widths, left=left, color=f"C{number}", label=label)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
