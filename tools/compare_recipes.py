"""Train recipes from the same seeds on the same data and compare them: table, JSON, pictures.

python tools/compare_recipes.py --config configs/quickstart.yaml --output runs/recipes \\
    --recipes bf16 o3 o4 o3_bf16=preset=o3,main_grads_dtype=bf16 --seeds 1 2 3 [--jobs 2] \\
    [section.key=value ...]

A recipe is a preset, or NAME=key=value[,key=value ...] of section `precision`. A seed chooses the
initial weights and the rounding's noise; the order of the data is the same in all runs. Gaps are
against the first recipe, in pairs of seeds, with the 95 % interval of their mean.

With logging.fp8_stats_interval=N among the overrides the SNR in dB of every operand's cast is
reported as well: the median over layers, of the last report, mean over seeds.

--jobs runs are trained at a time, on one thread each. A run that is interrupted goes on from its
last checkpoint when the same command is given again, and what is done is not trained again. Left in
--output: a folder per run, summary.json, loss.png, gaps.png.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from compare_runs import describe_gap, plot, print_table, read_curves, read_reports, summarize

from fp8lm.arguments import as_path, path_text, split_overrides
from fp8lm.config import load_config
from fp8lm.data.files import write_aside
from fp8lm.pictures import save_figure
from fp8lm.runtime.errors import CommandParser, InputError, RunFailed, run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
STEP_TIME = "iteration-time"
OPERANDS = ("input", "weight", "grad_output")
OWN_KEYS = (
    "train.seed",
    "data.shuffle_seed",
    "train.num_threads",
    "logging.dir",
    "checkpoint.save",
    "checkpoint.load",
    "checkpoint.keep_last",
)


@dataclass(frozen=True)
class Training:
    """One run: `arguments` of pretrain_gpt.py, its `folder`."""

    folder: Path
    arguments: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        """Whether it has come to its end before; InputError if `folder` is of another run."""
        try:
            record = json.loads((self.folder / "recipe.json").read_text())
        except FileNotFoundError:
            return False
        if record["arguments"] != list(self.arguments):
            raise InputError(
                f"{self.folder} holds a run of other arguments: use another --output, or delete it"
            )
        return record["done"]

    def write_record(self, *, done: bool) -> None:
        """Note what is trained here, and whether it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"arguments": self.arguments, "done": done}
        write_aside(self.folder / "recipe.json", json.dumps(record, indent=1) + "\n")

    def run(self) -> None:
        """Train, or go on; RunFailed if it ends otherwise."""
        self.write_record(done=False)
        log = self.folder / "log.txt"
        command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *self.arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("a") as output:
            ended = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
            )
        if ended.returncode:
            raise RunFailed(f"{self.folder} ended with exit code {ended.returncode}: see {log}")
        self.write_record(done=True)


def main(argv: list[str]) -> None:
    """Train what is not done, print, and write."""
    lines = __doc__.splitlines()
    parser = CommandParser(description=lines[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", type=as_path, required=True, help="folder of all runs")
    parser.add_argument("--recipes", type=path_text, nargs="+", required=True, metavar="RECIPE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="default: 1")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default: 1")
    argv, overrides = split_overrides(argv)
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error("--jobs is at least 1")
    refuse_own_keys(overrides, "compare_recipes.py")
    recipes = read_recipes(options.recipes)
    trainings = {
        name: [
            prepare(options.config, options.output / f"{name}-{seed}", [*overrides, *keys], seed)
            for seed in options.seeds
        ]
        for name, keys in recipes.items()
    }
    train_all([run for runs in trainings.values() for run in runs], options.jobs)
    folders = {name: [run.folder for run in runs] for name, runs in trainings.items()}
    report(folders, options.output)


def refuse_own_keys(overrides: list[str], tool: str) -> None:
    """InputError for what `tool` sets: runs would be no pairs, or share their folders."""
    for override in overrides:
        key = override.partition("=")[0]
        if key in OWN_KEYS or key.startswith("precision."):
            raise InputError(f"{override}: {key} is set by {tool}, by recipe or seed")


def read_recipes(texts: list[str]) -> dict[str, list[str]]:
    """Overrides by the name of the recipe; InputError for a name that comes twice."""
    recipes = [read_recipe(text) for text in texts]
    names = [name for name, _ in recipes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"--recipes has {', '.join(sorted(twice))} twice: give each a name")
    return dict(recipes)


def read_recipe(text: str) -> tuple[str, list[str]]:
    """Name and overrides of a recipe."""
    name, _, keys = text.partition("=")
    if not keys:
        return name, [f"precision.preset={name}"]
    if not name or "/" in name:
        raise InputError(f"--recipes {text}: expected NAME=key=value[,key=value]")
    return name, [f"precision.{key}" for key in keys.split(",")]


def prepare(config: str, folder: Path, overrides: list[str], seed: int) -> Training:
    """The run of one recipe and seed; InputError if its config is wrong."""
    checkpoints = folder / "checkpoints"
    values = (seed, 1, 1, folder, checkpoints, checkpoints, 1)
    own = [f"{key}={value}" for key, value in zip(OWN_KEYS, values, strict=True)]
    load_config(config, [*own, *overrides])
    return Training(folder, ("--config", config, *own, *overrides))


def train_all(trainings: list[Training], jobs: int) -> None:
    """Train all that is not done, `jobs` at a time; the first failure is raised at the end."""
    waiting = [training for training in trainings if not training.is_done]
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(training.run) for training in waiting]
        for future in tqdm(running, unit="run", disable=None):
            future.exception()
    for future in running:
        future.result()


def report(folders: dict[str, list[Path]], output: Path) -> None:
    """Table, summary.json, loss.png and gaps.png of all runs."""
    curves = {name: [read_curves(folder) for folder in own] for name, own in folders.items()}
    summary = summarize(curves)
    for name, own in folders.items():
        summary[name]["median seconds per iteration"] = statistics.median(
            line[STEP_TIME]
            for folder in own
            for line in read_reports(folder / "metrics.jsonl")
            if STEP_TIME in line
        )
    for name, own in folders.items():
        summary[name]["SNR dB"] = operand_snr([folder / "metrics.jsonl" for folder in own])
    print_table(summary)
    print_gaps_over_time(summary)
    print_snr(summary)
    write_aside(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot(curves, output / "loss.png")
    plot_gaps(summary, output / "gaps.png")


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


def print_snr(summary: dict[str, dict[str, Any]]) -> None:
    """A table of what `operand_snr` found, if anything."""
    if not any(row["SNR dB"] for row in summary.values()):
        return
    width = max(len(name) for name in summary) + 2
    print(f"\n{'SNR, dB':{width}}" + "".join(f"{kind:>16}" for kind in OPERANDS))
    for name, row in summary.items():
        cells = (row["SNR dB"].get(kind) for kind in OPERANDS)
        texts = ("" if value is None else f"{value:.1f}" for value in cells)
        print(f"{name:{width}}" + "".join(f"{text:>16}" for text in texts))


def print_gaps_over_time(summary: dict[str, dict[str, Any]]) -> None:
    """A table of the gaps at every validation after the first steps."""
    base, *others = summary
    width = max(len(name) for name in (*others, f"above {base}")) + 2
    for number, name in enumerate(others):
        points = [point for point in summary[name]["gap % over time"] if point["iteration"]]
        if number == 0:
            heads = "".join(f"{point['iteration']:>16}" for point in points)
            print(f"\n{f'above {base}':{width}}{heads}")
        print(f"{name:{width}}" + "".join(f"{describe_gap(point):>16}" for point in points))


def plot_gaps(summary: dict[str, dict[str, Any]], path: Path) -> None:
    """Gaps of all recipes to the first, at the end and over time."""
    from matplotlib.figure import Figure  # without a display, and half a second to import

    figure = Figure(figsize=(14, max(4.0, 1.2 + 0.5 * len(summary))), layout="tight")
    last, over_time = figure.subplots(1, 2)
    plot_last_gaps(summary, last)
    plot_gaps_over_time(summary, over_time)
    save_figure(figure, path, dpi=120)


def plot_last_gaps(summary: dict[str, dict[str, Any]], axis: Axes) -> None:
    """Of every recipe its seeds, their mean and its interval."""
    base, *others = summary
    for height, name in enumerate(reversed(others)):
        row = summary[name]
        seeds = row["gap % by seed"] or [row["gap %"]]
        axis.plot(seeds, [height] * len(seeds), "o", color="0.6", markersize=4)
        axis.errorbar(row["gap %"], height, xerr=row["gap % +-"] or 0.0, fmt="D", capsize=4)
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(others)), list(reversed(others)))
    axis.set_xlabel(f"validation loss above {base} in %: seeds, mean, 95 % interval of the mean")
    axis.grid(alpha=0.3)


def plot_gaps_over_time(summary: dict[str, dict[str, Any]], axis: Axes) -> None:
    """Means with their intervals, beside each other where they would hide each other."""
    base, *others = summary
    for number, name in enumerate(others):
        points = [point for point in summary[name]["gap % over time"] if point["iteration"]]
        apart = 0.01 * (number - len(others) / 2) * summary[name]["iterations"]
        x = [point["iteration"] + apart for point in points]
        y = [point["gap %"] for point in points]
        intervals = [point["gap % +-"] or 0.0 for point in points]
        axis.errorbar(x, y, yerr=intervals, marker=".", linewidth=1, elinewidth=0.6, label=name)
    axis.axhline(0.0, color="black", linewidth=0.8)
    axis.set_xlabel("iteration")
    axis.set_ylabel(f"mean above {base} in %, 95 % interval")
    axis.grid(alpha=0.3)
    if others:
        axis.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(run_command(main))
