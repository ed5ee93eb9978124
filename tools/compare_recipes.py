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
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from compare_runs import plot, print_table, read_curves, read_reports, summarize
from reporting.recipes import operand_snr, plot_gaps, print_costs, print_gaps_over_time

from fp8lm.arguments import EachOnce, folder_to_write, path_text, split_overrides
from fp8lm.checkpoint.files import latest_iteration
from fp8lm.comm.accounting import Wire, WireCounter
from fp8lm.config import Config, load_config
from fp8lm.config.keys import flatten
from fp8lm.data.files import write_aside
from fp8lm.gradient.reduction import sent_format
from fp8lm.numerics import FP32, Format, format_by_name, granularity_of
from fp8lm.runtime.errors import CommandParser, InputError, RunFailed, run_command

ROOT = Path(__file__).resolve().parents[1]
STEP_TIME = "iteration-time"
METRICS = "metrics.jsonl"
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
    """One run: `arguments` of pretrain_gpt.py, its `folder`, and the `config` these make."""

    folder: Path
    arguments: tuple[str, ...]
    config: Config

    @property
    def record(self) -> Path:
        """The file that says what was trained in `folder`."""
        return self.folder / "recipe.json"

    @property
    def is_done(self) -> bool:
        """Whether it has come to its end before; InputError if `folder` is of another run."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            before, done = flatten(record["config"]), record["done"]
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{self.record} is damaged: delete {self.folder}") from None
        now = flatten(self.config.model_dump(mode="json"))
        changed = [key for key in now | before if now.get(key) != before.get(key)]
        if changed:
            raise InputError(
                f"{self.folder} holds a run with {changed[0]} = {before.get(changed[0])}, not "
                f"{now.get(changed[0])}: use another --output, or delete it"
            )
        return done

    def write_record(self, *, done: bool) -> None:
        """Note what is trained here, and whether it is."""
        config = self.config.model_dump(mode="json")
        record = {"arguments": self.arguments, "done": done, "config": config}
        write_aside(self.record, json.dumps(record, indent=1) + "\n")

    def run(self) -> None:
        """Train, or go on; RunFailed if it ends otherwise, or earlier."""
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
        last, wanted = latest_iteration(self.folder / "checkpoints"), self.config.train.train_iters
        if last != wanted:
            raise RunFailed(
                f"{self.folder} stopped after iteration {last} of {wanted} (see {log}): the same "
                "command goes on"
            )
        self.write_record(done=True)


def main(argv: list[str]) -> None:
    """Train what is not done, print, and write."""
    lines = __doc__.splitlines()
    parser = CommandParser(description=lines[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", type=folder_to_write, required=True, help="folder of all runs")
    parser.add_argument("--recipes", type=path_text, nargs="+", required=True, metavar="RECIPE")
    parser.add_argument(
        "--seeds", type=int, nargs="+", action=EachOnce, default=[1], help="default: 1"
    )
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
    summary = summary_of(trainings)
    print_table(summary)
    print_gaps_over_time(summary)
    print_costs(summary)
    write_aside(options.output / "summary.json", json.dumps(summary, indent=1) + "\n")
    curves = {n: [read_curves(run.folder) for run in runs] for n, runs in trainings.items()}
    plot(curves, options.output / "loss.png")
    plot_gaps(summary, options.output / "gaps.png")


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
    pairs = keys.split(",")
    named = [pair.partition("=")[0] for pair in pairs]
    if twice := {key for key in named if named.count(key) > 1}:
        raise InputError(f"--recipes {text}: {', '.join(sorted(twice))} comes twice")
    return name, [f"precision.{pair}" for pair in pairs]


def prepare(config: str, folder: Path, overrides: list[str], seed: int) -> Training:
    """The run of one recipe and seed; InputError if its config is wrong."""
    checkpoints = folder / "checkpoints"
    values = (seed, 1, 1, folder, checkpoints, checkpoints, 1)
    own = [f"{key}={value}" for key, value in zip(OWN_KEYS, values, strict=True)]
    loaded = load_config(config, [*own, *overrides])
    if loaded.train.train_iters is None or loaded.train.eval_iters == 0:
        raise InputError(
            "runs are compared by their last validation: set train.train_iters and train.eval_iters"
        )
    arguments = ("--config", config, *own, *overrides)
    return Training(folder, arguments, loaded)


def sent_bytes(config: Config) -> float:
    """Of a linear layer's parameter in a step: its gradient and, with ZeRO, what is made of it.

    To and from each of the other data-parallel ranks, the mean over all linear layers. Scales of
    blocks are counted, one of a whole matrix is not.
    """
    layers, precision = config.model.num_layers, config.precision
    in_bf16 = min(2, layers) if precision.first_last_layers_bf16 else 0
    params = format_by_name(precision.params_dtype).bytes  # sent as they are stored
    if precision.params_dtype == "fp8_e4m3" and precision.wire.params == "bf16":
        params = 2
    of_recipe = sent_gradient_bytes(config, format_by_name(precision.main_grads_dtype)) + params
    of_others = sent_gradient_bytes(config, FP32) + 2  # their gradients are in fp32
    return (in_bf16 * of_others + (layers - in_bf16) * of_recipe) / layers


def sent_gradient_bytes(config: Config, stored: Format) -> float:
    """Of a layer's parameter whose gradient is kept in `stored`."""
    model, wire = config.model, Wire.of_key("grads", config.precision.wire, WireCounter())
    sent = sent_format(stored, wire, keep_high_precision=False)
    queries, ffn = model.query_projection_size, model.ffn_hidden_size
    shapes = (
        (queries + 2 * model.kv_projection_size, model.hidden_size),
        (model.hidden_size, queries),
        (ffn * (2 if model.swiglu else 1), model.hidden_size),
        (model.hidden_size, ffn),
    )
    scales = sum(4 * math.prod(granularity_of(sent, shape).scale_shape(shape)) for shape in shapes)
    if granularity_of(sent, shapes[0]).is_per_tensor:
        scales = 0
    return sent.bytes + scales / sum(map(math.prod, shapes))


def train_all(trainings: list[Training], jobs: int) -> None:
    """Train all that is not done, `jobs` at a time; the first failure is raised at the end."""
    waiting = [training for training in trainings if not training.is_done]
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(training.run) for training in waiting]
        try:
            for future in tqdm(running, unit="run", disable=None):
                future.exception()
        except KeyboardInterrupt:  # or what waits would be begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for future in running:
        future.result()


def summary_of(trainings: dict[str, list[Training]]) -> dict[str, dict[str, Any]]:
    """What `summarize` finds; and by recipe its keys, its seeds, time, wires and SNR."""
    folders = {name: [run.folder for run in runs] for name, runs in trainings.items()}
    summary = summarize({name: list(map(read_curves, own)) for name, own in folders.items()})
    for name, runs in trainings.items():
        summary[name] |= {
            "precision": runs[0].config.precision.model_dump(mode="json"),
            "seeds": [run.config.train.seed for run in runs],
            "bytes on wires per linear parameter": sent_bytes(runs[0].config),
            "median seconds per iteration": seconds_per_iteration(folders[name]),
            "SNR dB": operand_snr([folder / METRICS for folder in folders[name]]),
        }
    return summary


def seconds_per_iteration(folders: list[Path]) -> float:
    """The median over all reports of all runs."""
    lines = (line for folder in folders for line in read_reports(folder / METRICS))
    return statistics.median(line[STEP_TIME] for line in lines if STEP_TIME in line)


if __name__ == "__main__":
    sys.exit(run_command(main))
