"""The page: one HTML file without scripts and without anything that it would load.

Pictures are SVG in data URLs, one node of the page each, so that the number of nodes depends on the
number of runs and findings and not on that of steps and layers.
"""

from __future__ import annotations

import statistics as numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from urllib.parse import quote

import numpy as np

from fp8lm.config.keys import flatten
from fp8lm.telemetry.findings import Finding, find
from reporting import figures
from reporting.runs import LOSS, VALIDATION, HeatMap, Points, Run

Settings = Mapping[str, Sequence[Run]]
MOST_FINDINGS = 20
MOST_DIFFERENCES = 40
CELLS = 2_000_000  # of all heat maps: at most four bytes each
SMOOTHED = 50  # a curve has about as many independent points
HEAT = ("snr", "underflow", "saturation", "kurtosis", "lost")
KINDS = (
    "input",
    "weight",
    "grad_output",
    "main_grad",
    "master",
    "exp_avg",
    "exp_avg_sq",
    "reduce_output",
    "reduce_grad_input",
    "send_grad",
)
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; color: #222 }
h1 { font-size: 1.5em } h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
h3 { margin: 1.2em 0 0 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .8em; text-align: left }
tr:nth-child(even) { background: #f5f5f5 } img { max-width: 100% }
.side { display: grid; grid-template-columns: 1fr 1fr; gap: .5em 1em }
code { background: #eee; padding: 0 .3em } .note { color: #666 }
"""


def page(settings: Settings, *, refresh: int | None = None) -> str:
    """The whole page; it loads itself again every `refresh` seconds."""
    again = "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh}">'
    title = "FP8 report: " + ", ".join(settings)
    sections = "".join(
        part
        for section in (_overview, _losses, _course, _memory, _differences, _health)
        for part in section(settings)
    )
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{again}'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{sections}</body></html>\n"
    )


def _overview(settings: Settings) -> Iterator[str]:
    base = next(iter(settings))
    columns: dict[str, Callable[[Sequence[Run]], str]] = {
        "seeds": lambda runs: f"{len(runs)}",
        "iterations": lambda runs: _last(runs, "iteration", ".0f"),
        "training loss": lambda runs: _mean_of(runs, LOSS),
        "validation loss": lambda runs: _mean_of(runs, VALIDATION),
        f"gap to {base}": lambda runs: _final_gap(settings[base], runs),
        "s per iteration": lambda runs: _last(runs, "iteration-time", ".3g"),
        "tokens/s": lambda runs: _last(runs, "tokens-per-second", ",.0f"),
        "state bytes per parameter": lambda runs: _last(runs, "state_bytes_per_parameter", ".2f"),
        "rollbacks": lambda runs: _last(runs, "rollbacks", ".0f"),
    }
    if len(settings) == 1:
        del columns[f"gap to {base}"]
    cells = [(name, *(cell(runs) for cell in columns.values())) for name, runs in settings.items()]
    yield _table(("run", *columns), cells)


def _last(runs: Sequence[Run], key: str, form: str) -> str:
    """Of the first seed's last report, in the format `form`."""
    value = runs[0].last.get(key)
    return "" if value is None else f"{value:{form}}"


def _losses(settings: Settings) -> Iterator[str]:
    yield "<h2>Loss</h2>"
    yield _side(
        _image(figures.curves(of_names, label), f"{label} over iterations")
        for key, label in ((LOSS, "training loss"), (VALIDATION, "validation loss"))
        if (of_names := _curves(settings, key))
    )
    base, *others = settings
    if others:
        yield f"<h3>Gap to {escape(base)}</h3>"
        yield _gap_picture(settings, base, others)


def _gap_picture(settings: Settings, base: str, others: Sequence[str]) -> str:
    """Training losses against the mean of the baseline's seeds, smoothed; its seeds as a band."""
    mean, seeds = _mean_curve(settings[base])
    gaps = {}
    for name in others:
        other, _ = _mean_curve(settings[name])
        common = [(i, 100 * (other[i] / mean[i] - 1)) for i in other if i in mean]
        if common:
            gaps[name] = smoothed(common)
    spread: list[tuple[int, float, float]] = []
    if len(seeds) > 1:
        bands = [smoothed([(i, 100 * (own[i] / mean[i] - 1)) for i in mean]) for own in seeds]
        for points in zip(*bands, strict=True):
            values = [value for _, value in points]
            spread.append((points[0][0], min(values), max(values)))
    if not gaps:
        return "<p>No iteration is reported in all runs.</p>"
    picture = figures.gaps(gaps, figures.thinned(spread), "gap in %")
    band = " The band is the spread of the baseline's seeds." if spread else ""
    note = f"Of training losses, running mean over 1/{SMOOTHED} of the run.{band}"
    label = "gap of the training loss to the baseline"
    return f'{_image(picture, label)}<p class="note">{note}</p>'


def _mean_curve(runs: Sequence[Run]) -> tuple[dict[int, float], list[dict[int, float]]]:
    """Mean training loss of `runs` at the iterations that all report, and each one's."""
    of_seeds = [dict(run.curves[LOSS]) for run in runs]
    common = sorted(set.intersection(*(set(curve) for curve in of_seeds)))
    mean = {i: numbers.fmean(curve[i] for curve in of_seeds) for i in common}
    return mean, [{i: curve[i] for i in common} for curve in of_seeds]


def smoothed(points: Points) -> Points:
    """A running mean."""
    window = max(1, len(points) // SMOOTHED)
    values = np.array([value for _, value in points])
    total = np.cumsum(np.concatenate(([0.0], values)))
    mean = (total[window:] - total[:-window]) / window
    iterations = [iteration for iteration, _ in points][window - 1 :]
    return list(zip(iterations, mean.tolist(), strict=True))


def _course(settings: Settings) -> Iterator[str]:
    yield "<h2>Course</h2>"
    yield _side(_course_pictures(settings))


def _course_pictures(settings: Settings) -> Iterator[str]:
    for key, label, logarithmic in (
        ("grad-norm", "gradient norm", True),
        ("tokens-per-second", "tokens/s", False),
        ("throughput", "TFLOP/s per device", False),
        ("skipped iterations", "skipped iterations", False),
        ("fp8_stats/layers_in_bf16", "layers in BF16", False),
    ):
        of_names = _curves(settings, key)
        values = {v for seeds in of_names.values() for points in seeds for _, v in points}
        if values - {0}:
            picture = figures.curves(of_names, label, logarithmic=logarithmic)
            yield _image(picture, f"{label} over iterations")


def _memory(settings: Settings) -> Iterator[str]:
    prefix = "state_bytes/"
    state = {
        name: {
            key.removeprefix(prefix): value / 1e6
            for key, value in runs[0].last.items()
            if key.startswith(prefix)
        }
        for name, runs in settings.items()
    }
    bars = figures.bars(state, "state of the main process in MB")
    pictures = [_image(bars, "bytes of state by part")]
    for key, label in (
        ("memory/gpu_peak", "GPU memory, peak (GB)"),
        ("memory/rss", "resident memory (GB)"),
    ):
        of_names = _curves(settings, key, 1e-9)
        if of_names:
            pictures.append(_image(figures.curves(of_names, label), f"{label} over iterations"))
            break
    yield "<h2>Memory</h2>"
    yield _side(pictures)


def _differences(settings: Settings) -> Iterator[str]:
    """Keys that the settings have otherwise, beside folders and seeds."""
    configs = {name: flatten(runs[0].config) for name, runs in settings.items()}
    own = ("logging.dir", "checkpoint.save", "checkpoint.load", "train.seed", "logging.wandb")
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    differing = [
        key
        for key in keys
        if not key.startswith(own) and len({str(c.get(key)) for c in configs.values()}) > 1
    ]
    if differing:
        yield "<h2>Config</h2>"
        rows = [
            (key, *(str(config.get(key, "")) for config in configs.values()))
            for key in differing[:MOST_DIFFERENCES]
        ]
        yield _table(("key", *configs), rows)


def _health(settings: Settings) -> Iterator[str]:
    yield "<h2>FP8 health</h2>"
    observed = {name: runs[0] for name, runs in settings.items() if runs[0].statistics}
    for name, runs in settings.items():
        if name in observed:
            yield from _findings(name, runs[0])
        else:
            key = "<code>logging.fp8_stats_interval</code>"
            yield f"<p>{escape(name)} has no statistics: set {key}.</p>"
    maps = {
        (kind, statistic, name): run.heat[kind, statistic]
        for kind in KINDS
        for statistic in HEAT
        for name, run in observed.items()
        if (kind, statistic) in run.heat and _varies(run.heat[kind, statistic])
    }
    for kind in dict.fromkeys(kind for kind, _, _ in maps):
        cells = min(CELLS // len(maps), figures.MOST_CELLS)
        yield f"<h3>{kind}</h3>"
        yield _side(_heat_map(heat, *key, cells) for key, heat in maps.items() if key[0] == kind)


def _varies(heat: HeatMap) -> bool:
    return len(np.unique(heat.values)) > 1


def _heat_map(heat: HeatMap, kind: str, statistic: str, name: str, cells: int) -> str:
    label = f"{statistic} of {kind} by layer and iteration, {name}"
    title = f"{name}: {statistic} of {kind}"
    return _image(figures.heat_map(heat, statistic, title, cells), label)


def _findings(name: str, run: Run) -> Iterator[str]:
    found = find(run.statistics, stochastic_master=run.stochastic_master)
    yield f"<h3>{escape(name)}: the worst tensors at iteration {run.statistics_at}</h3>"
    if not found:
        yield "<p>No tensor is beyond its bounds.</p>"
        return
    header = ("layer", "tensor", "what is wrong", "key to change")
    yield _table(header, [_row(finding) for finding in found[:MOST_FINDINGS]])
    if len(found) > MOST_FINDINGS:
        yield f'<p class="note">and {len(found) - MOST_FINDINGS} more</p>'


def _row(finding: Finding) -> tuple[str, ...]:
    return finding.layer, finding.kind, finding.sentence, finding.key


def _curves(settings: Settings, key: str, factor: float = 1.0) -> dict[str, list[Points]]:
    """Curves of all seeds by name, without runs that have none; values times `factor`."""
    found: dict[str, list[Points]] = {}
    for name, runs in settings.items():
        for run in runs:
            if points := run.curves[key]:
                found.setdefault(name, []).append([(i, factor * value) for i, value in points])
    return found


def _mean_of(runs: Sequence[Run], key: str) -> str:
    values = [run.curves[key][-1][1] for run in runs if run.curves[key]]
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
    return f"{numbers.fmean(values):.4f}{spread}"


def _final_gap(base: Sequence[Run], runs: Sequence[Run]) -> str:
    """Of the mean of the last validation losses; none of the baseline itself."""
    ends = [
        [run.curves[VALIDATION][-1][1] for run in own if run.curves[VALIDATION]]
        for own in (base, runs)
    ]
    if runs is base or not all(ends):
        return ""
    first, second = map(numbers.fmean, ends)
    return f"{100 * (second / first - 1):+.2f} %"


def _side(pictures: Iterable[str]) -> str:
    """Pictures in two columns."""
    return '<div class="side">' + "".join(f"<div>{own}</div>" for own in pictures) + "</div>"


def _image(svg: bytes, label: str) -> str:
    # Not in base64, in which the pixels of a heat map are already.
    data = quote(svg, safe=" !$()*+,-./:;=?@[]^_|~\n")
    return f'<img alt="{escape(label)}" src="data:image/svg+xml,{data}">'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
