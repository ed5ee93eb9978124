"""Gaps of recipes over several comparisons: the mean of all pairs of seeds, with its interval.

python tools/pool_gaps.py SUMMARY [SUMMARY ...] [--base NAME]

A SUMMARY is what tools/compare_recipes.py has left, summary.json. The gap of a pair is how far a
recipe's loss lies above that of --base (default: the first of the first summary) with the same seed
in the same comparison; the interval of their mean has 95 % (Student's t). A recipe that is not in
every summary has fewer pairs.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from compare_runs import half_width, paired_gaps

from fp8lm.arguments import as_path, path_text
from fp8lm.runtime.errors import CommandParser, InputError, run_command

Summary = dict[str, dict[str, Any]]
LOSSES = "validation losses"


def main(argv: list[str]) -> None:
    """Read, and print a line for every recipe."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("summaries", type=as_path, nargs="+", metavar="SUMMARY")
    parser.add_argument("--base", type=path_text, help="default: the first of the first summary")
    options = parser.parse_args(argv)
    summaries = {path: read_summary(path) for path in options.summaries}
    base = options.base or next(iter(summaries[options.summaries[0]]))
    pooled: dict[str, list[float]] = {}
    for path, summary in summaries.items():
        for name, gaps in gaps_to(base, summary, path).items():
            pooled.setdefault(name, []).extend(gaps)
    if not pooled:
        raise InputError(f"nothing beside {base} in {', '.join(map(str, summaries))}")
    width = max(map(len, pooled)) + 2
    print(f"{f'above {base}':{width}}{'mean':>10}{'95 %':>10}{'pairs':>7}{'least':>10}{'most':>10}")
    for name, gaps in pooled.items():
        half = half_width(gaps)
        interval = "" if half is None else f"+-{half:.3f} %"
        extremes = f"{min(gaps):+.3f} %", f"{max(gaps):+.3f} %"
        cells = f"{statistics.fmean(gaps):+.3f} %", interval
        print(
            f"{name:{width}}"
            + "".join(f"{cell:>10}" for cell in cells)
            + f"{len(gaps):7}"
            + "".join(f"{cell:>10}" for cell in extremes)
        )


def read_summary(path: Path) -> Summary:
    """The recipes of a summary.json, each with its losses by seed."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        losses = [row[LOSSES] for row in summary.values()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        losses = []
    if not losses:
        raise InputError(f"{path} is no summary.json of tools/compare_recipes.py")
    return summary


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
