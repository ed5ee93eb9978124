"""Compare finished runs: final losses, gaps, memory; a JSON summary and a picture of the curves.

python tools/compare_runs.py bf16=runs/a fp8=runs/b [--summary summary.json] [--plot loss.png]

Each argument is NAME=FOLDER[,FOLDER...], folders with a metrics.jsonl; several are seeds of
one setting, reported as mean and spread. Gaps are against the first NAME, in pairs of seeds where
both have as many; then with the 95 % interval of their mean (Student's t).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8lm.arguments import file_to_write, path_text
from fp8lm.data.files import write_aside
from fp8lm.pictures import picture_path, save_figure
from fp8lm.runtime.errors import CommandParser, InputError, run_command

TRAIN, VALID = "lm loss", "lm loss validation"
# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; beyond the last that of the last.
_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16]
_T += [2.145, 2.131, 2.12, 2.11, 2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056]


@dataclass(frozen=True)
class Curves:
    """One run: (iteration, loss) of training and validation, and its last report."""

    train: list[tuple[int, float]]
    valid: list[tuple[int, float]]
    last: dict[str, float]

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients, master weights and moments."""
        return sum(int(size) for key, size in self.last.items() if key.startswith("state_bytes/"))

    @property
    def sent_bytes(self) -> dict[str, int]:
        """Bytes the main process sent in one iteration, per wire that it has."""
        prefix = "comm_bytes/"
        return {
            key.removeprefix(prefix): int(value)
            for key, value in self.last.items()
            if key.startswith(prefix)
        }


def main(argv: list[str]) -> None:
    """Read, print, and write what was asked for."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=path_text, nargs="+", metavar="NAME=FOLDER[,FOLDER]")
    parser.add_argument("--summary", type=file_to_write, help="JSON file to write")
    parser.add_argument("--plot", type=picture_path, help="PNG or other picture to write")
    options = parser.parse_args(argv)
    settings = dict(read_setting(argument) for argument in options.runs)
    summary = summarize(settings)
    print_table(summary)
    if options.summary:
        write_aside(options.summary, (json.dumps(summary, indent=1) + "\n").encode())
    if options.plot:
        plot(settings, options.plot)


def read_setting(argument: str) -> tuple[str, list[Curves]]:
    """NAME and the curves of its folders."""
    name, separator, folders = argument.partition("=")
    if not separator:
        raise InputError(f"{argument}: expected NAME=FOLDER")
    return name, [read_curves(Path(folder)) for folder in folders.split(",")]


def read_curves(folder: Path) -> Curves:
    """The curves in FOLDER/metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{path} does not exist: train with logging.dir={folder}")
    lines = list(read_reports(path))
    points = {
        key: [(int(line["iteration"]), line[key]) for line in lines if line.get(key) is not None]
        for key in (TRAIN, VALID)
    }
    if not points[TRAIN] or not points[VALID]:
        raise InputError(f"{path} has no training or no validation losses yet")
    last = next(line for line in reversed(lines) if TRAIN in line)
    return Curves(points[TRAIN], points[VALID], last)


def read_reports(path: Path) -> Iterator[dict[str, float]]:
    """The objects of a metrics.jsonl; a last line that a run has not finished is passed over."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            report = json.loads(line)
            report["iteration"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith("\n"):
                return
            raise InputError(f"{path}, line {number}: no report of a run: {line!r:.40}") from None
        yield report


def summarize(settings: dict[str, list[Curves]]) -> dict[str, dict]:
    """Per setting: losses per seed, their mean and spread, gap in percent, bytes of state."""
    summary: dict[str, dict] = {}
    first_runs = next(iter(settings.values()))
    for name, runs in settings.items():
        losses = [run.valid[-1][1] for run in runs]
        mean = statistics.fmean(losses)
        base = next(iter(summary.values()), None)
        first, gaps = runs[0], paired_gaps(losses, base["validation losses"] if base else [])
        summary[name] = {
            "iterations": first.valid[-1][0],
            "untrained validation loss": first.valid[0][1],
            "validation losses": losses,
            "validation loss": mean,
            "spread": max(losses) - min(losses),
            "gap %": statistics.fmean(gaps) if gaps else 0.0,
            "gap % by seed": gaps if base and len(losses) > 1 else [],
            "gap % +-": half_width(gaps) if base else None,
            "gap % over time": gaps_over_time(runs, first_runs) if base else [],
            "state bytes": first.state_bytes,
            "state bytes saved": base["state bytes"] - first.state_bytes if base else 0,
            "state bytes per parameter": first.last["state_bytes_per_parameter"],
            "state bytes per linear parameter": first.last["state_bytes_per_linear_parameter"],
            "bytes sent per iteration": first.sent_bytes,
        }
    return summary


def paired_gaps(losses: list[float], base: list[float]) -> list[float]:
    """Percent above the losses `base`, seed by seed, or of the means; none without a base."""
    if not base:
        return []
    if len(base) != len(losses):
        losses, base = [statistics.fmean(losses)], [statistics.fmean(base)]
    return [100 * (loss / other - 1) for loss, other in zip(losses, base, strict=True)]


def gaps_over_time(runs: list[Curves], base: list[Curves]) -> list[dict[str, Any]]:
    """At every validation that all runs had: mean gap to `base` and half its interval."""
    of_runs, of_base = [dict(run.valid) for run in runs], [dict(run.valid) for run in base]
    shared = set.intersection(*map(set, (*of_runs, *of_base)))
    found = []
    for iteration in sorted(shared):
        losses, others = ([valid[iteration] for valid in of] for of in (of_runs, of_base))
        gaps = paired_gaps(losses, others)
        row = {"gap %": statistics.fmean(gaps), "gap % +-": half_width(gaps)}
        found.append({"iteration": iteration, **row})
    return found


def half_width(values: list[float]) -> float | None:
    """Of the 95 % interval of their mean; None for one value."""
    if len(values) < 2:
        return None
    t = _T[min(len(values) - 2, len(_T) - 1)]
    return t * statistics.stdev(values) / math.sqrt(len(values))


def describe_gap(row: dict[str, Any]) -> str:
    """The gap and its interval."""
    interval = "" if row["gap % +-"] is None else f" +- {row['gap % +-']:.2f}"
    return f"{row['gap %']:+.2f}{interval} %"


def print_table(summary: dict[str, dict]) -> None:
    """The summary as text."""
    width = max(len(name) for name in summary) + 2
    header = ("untrained", "validation", "gap", "spread", "B/linear", "state", "saved", "sent")
    print(f"{'':{width}}" + "".join(f"{title:>16}" for title in header))
    for name, row in summary.items():
        cells = (
            f"{row['untrained validation loss']:.4f}",
            f"{row['validation loss']:.4f}",
            "" if row is next(iter(summary.values())) else describe_gap(row),
            f"{row['spread']:.4f}" if len(row["validation losses"]) > 1 else "",
            f"{row['state bytes per linear parameter']:.2f}",
            f"{row['state bytes'] / 1e6:.1f} MB",
            f"{row['state bytes saved'] / 1e6:.1f} MB",
            f"{sum(row['bytes sent per iteration'].values()) / 1e6:.2f} MB",
        )
        print(f"{name:{width}}" + "".join(f"{cell:>16}" for cell in cells))
    print("B/linear: bytes of state per parameter of the linear layers; state: of all parameters;")
    print("saved: of them, against the first; sent: by the main process in one iteration")


def plot(settings: dict[str, list[Curves]], path: Path) -> None:
    """Training curves are thin lines, validation has markers; one colour per setting."""
    from matplotlib.figure import Figure  # without a display, and half a second to import

    figure = Figure(figsize=(8, 5), layout="tight")
    axis = figure.subplots()
    for index, (name, runs) in enumerate(settings.items()):
        color = f"C{index}"
        for number, run in enumerate(runs):
            axis.plot(*zip(*run.train, strict=True), color=color, alpha=0.35, linewidth=0.8)
            label = f"{name}: {run.valid[-1][1]:.4f}" if number == 0 else None
            if number == 0 and len(runs) > 1:
                label = f"{name}: {statistics.fmean(r.valid[-1][1] for r in runs):.4f} (mean)"
            # Curves that lie on each other are told apart by their dashes.
            marker: dict[str, Any] = dict(marker="os^Dv"[index % 5], markersize=4, linewidth=1.4)
            marker["linestyle"] = ("-", "--", "-.", ":")[index % 4]
            axis.plot(*zip(*run.valid, strict=True), color=color, label=label, **marker)
    axis.set_xlabel("iteration")
    axis.set_ylabel("loss (thin: training, markers: validation)")
    axis.grid(alpha=0.3)
    axis.legend(title="final validation loss")
    save_figure(figure, path, dpi=120)


if __name__ == "__main__":
    sys.exit(run_command(main))
