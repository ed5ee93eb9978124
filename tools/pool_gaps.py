"""Gaps of recipes over several comparisons: the mean of all pairs of seeds, with its interval.

python tools/pool_gaps.py SUMMARY[,SUMMARY ...] [SUMMARY[,SUMMARY ...] ...] [--base NAME]

A SUMMARY is what tools/compare_recipes.py has left, summary.json. The gap of a pair is how far a
recipe's loss lies above that of --base (default: the first of the first summary) with the same seed
in the same comparison; the interval of their mean has 95 % (Student's t). A recipe that is not in
every summary has fewer pairs.

Comparisons with a comma between them are of the same initial weights, at two learning rates for
instance: their gaps of a seed are not independent, and count as one, their mean.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from compare_runs import half_width, paired_gaps

from fp8lm.arguments import path_text
from fp8lm.runtime.errors import CommandParser, InputError, run_command

Summary = dict[str, dict[str, Any]]
LOSSES, KEYS, SEEDS = "validation losses", "precision", "seeds"


def main(argv: list[str]) -> None:
    """Read, and print a line for every recipe."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("summaries", nargs="+", metavar="SUMMARY[,SUMMARY ...]")
    parser.add_argument("--base", type=path_text, help="default: the first of the first summary")
    options = parser.parse_args(argv)
    groups = [[Path(path_text(name)) for name in text.split(",")] for text in options.summaries]
    summaries = {path: read_summary(path) for group in groups for path in group}
    check_paths([path for group in groups for path in group])
    check_recipes(summaries)
    base = options.base or next(iter(next(iter(summaries.values()))))
    pooled: dict[str, list[float]] = {}
    for group in groups:
        for name, gaps in mean_gaps(base, {path: summaries[path] for path in group}).items():
            pooled.setdefault(name, []).extend(gaps)
    if not pooled:
        raise InputError(f"nothing beside {base} in {', '.join(map(str, summaries))}")
    print_table(base, pooled)


def print_table(base: str, pooled: dict[str, list[float]]) -> None:
    """A line for every recipe."""
    width = max(len(name) for name in (*pooled, f"above {base}")) + 2
    print(f"{f'above {base}':{width}}{'mean':>10}{'95 %':>11}{'pairs':>7}{'least':>10}{'most':>10}")
    for name, gaps in pooled.items():
        half = half_width(gaps)
        interval = "" if half is None else f"+-{half:.3f} %"
        print(
            f"{name:{width}}{statistics.fmean(gaps):>+8.3f} %{interval:>11}{len(gaps):7}"
            f"{min(gaps):>+8.3f} %{max(gaps):>+8.3f} %"
        )


def read_summary(path: Path) -> Summary:
    """The recipes of a summary.json, each with its losses by seed."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        losses = [loss for row in summary.values() for loss in row[LOSSES] or [None]]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        losses = []
    if not losses or not all(_is_loss(loss) for loss in losses):
        raise InputError(f"{path} is no summary.json of tools/compare_recipes.py")
    return summary


def _is_loss(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def check_paths(paths: list[Path]) -> None:
    """InputError for a file that is named twice: its pairs would count twice."""
    for number, path in enumerate(paths):
        if any(path.samefile(other) for other in paths[:number]):
            raise InputError(f"{path} is named twice")


def check_recipes(summaries: dict[Path, Summary]) -> None:
    """InputError for a name that means one recipe here and another one there."""
    first: dict[str, Path] = {}
    for path, summary in summaries.items():
        for name in summary:
            there = first.setdefault(name, path)
            keys, others = summary[name].get(KEYS), summaries[there][name].get(KEYS)
            if None not in (keys, others) and keys != others:
                raise InputError(f"{name} is one recipe in {there} and another one in {path}")


def mean_gaps(base: str, group: dict[Path, Summary]) -> dict[str, list[float]]:
    """Per recipe but `base` its gap of every seed: the mean over the comparisons that have it."""
    check_seeds(group)
    found: dict[str, list[list[float]]] = {}
    for path, summary in group.items():
        for name, gaps in gaps_to(base, summary, path).items():
            found.setdefault(name, []).append(gaps)
    return {
        name: [statistics.fmean(of_seed) for of_seed in zip(*gaps, strict=True)]
        for name, gaps in found.items()
    }


def check_seeds(group: dict[Path, Summary]) -> None:
    """InputError if what should share its initial weights was trained from other seeds."""
    rows = [(path, row) for path, summary in group.items() for row in summary.values()]
    seeds = {path: row.get(SEEDS) for path, row in rows}
    known = {path: own for path, own in seeds.items() if own is not None}
    counts = {path: len(row[LOSSES]) for path, row in rows}
    for found in (known, counts):
        if len({json.dumps(value) for value in found.values()}) > 1:
            raise InputError(f"{', '.join(map(str, group))} have different seeds: no comma there")


def gaps_to(base: str, summary: Summary, path: Path) -> dict[str, list[float]]:
    """Per recipe but `base`: percent above its losses, seed by seed; InputError for other seeds."""
    if base not in summary:
        raise InputError(f"{path} has no recipe {base}, but {', '.join(summary)}: set --base")
    counts = {name: len(row[LOSSES]) for name, row in summary.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"{path}: recipes with different numbers of seeds: {counts}")
    others = {name: row[LOSSES] for name, row in summary.items() if name != base}
    return {name: paired_gaps(losses, summary[base][LOSSES]) for name, losses in others.items()}


if __name__ == "__main__":
    sys.exit(run_command(main))
