"""What a checkpoint costs the training: written at once, and beside it, in one run.

[torchrun --nproc-per-node=2] tools/bench_checkpoint.py --config configs/gpt_mini.yaml \\
    [--rounds 7] [--steps 6] [--folder DIR] [--output FILE.json] [section.key=value ...]

A round is --steps training steps without a checkpoint, with a synchronous and with an asynchronous
one after the first step. Reported by the main process, medians over the rounds: milliseconds for
which `save` held the training up, by how much the round was longer than the one without (the
writing thread takes time from the steps too), and until the checkpoint was on disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

from fp8lm.arguments import file_to_write, folder_to_write
from fp8lm.batch import Batch
from fp8lm.checkpoint import CheckpointSaver
from fp8lm.comm.groups import process_groups, rank_device
from fp8lm.config import load_config
from fp8lm.data.files import write_aside
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import CommandParser
from fp8lm.training.build import Run, build
from fp8lm.training.builders import resolve_device
from fp8lm.training.evaluation import run_batches
from fp8lm.training.memory import state_bytes
from fp8lm.training.state import by_name, model_shards, optimizer_shards
from fp8lm.training.step import train_step

MODES = ("none", "synchronous", "asynchronous")
COLUMNS = ("held up", "longer", "on disk after")


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--folder", type=folder_to_write, default=Path("runs/bench_checkpoint"))
    parser.add_argument("--output", type=file_to_write)
    options, overrides = parser.parse_known_args(argv)
    mock = ["data.mock_data=true", "data.data_path=null", "tokenizer.tokenizer_model=null"]
    mock += ["tokenizer.tokenizer_type=NullTokenizer", "tokenizer.vocab_size=511"]
    config = load_config(options.config, [*mock, *overrides])
    device = rank_device(resolve_device(config.train.device))
    with process_groups(device, config.parallel) as groups:
        run = build(config, groups, device)
        result = measure(run, options)
        if groups.is_main:
            report(result)
            for mode in MODES[1:]:
                shutil.rmtree(options.folder / mode, ignore_errors=True)
            if options.output:
                write_aside(options.output, json.dumps(result, indent=1) + "\n")


def measure(run: Run, options: argparse.Namespace) -> dict:
    """Medians by mode."""
    count = run.batch_size.num_microbatches(0)
    batches = run_batches(run, run.train_dataset, 0).next(count)
    microbatches = [batch.to(run.device) for batch in batches]
    savers = {
        mode: CheckpointSaver(
            options.folder / mode, run.groups.saving, asynchronous=mode == "asynchronous"
        )
        for mode in MODES[1:]
    }
    rounds: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for number in range(options.rounds + 1):
        for mode in MODES:
            measured = one_round(run, microbatches, savers.get(mode), options.steps, number)
            if number:  # the first round warms up, and shows which rank writes what
                rounds[mode].append(measured)
    for saver in savers.values():
        saver.close()
        if errors := [outcome.error for outcome in saver.collect() if outcome.error]:
            raise errors[0]
    return summary(run, rounds, options)


def one_round(
    run: Run, microbatches: list[Batch], saver: CheckpointSaver | None, steps: int, iteration: int
) -> list[float]:
    """Seconds: of all steps and the call of `save`, of that call, until it was on disk."""
    run.groups.world.barrier().wait()
    held_up = on_disk = 0.0
    began = time.perf_counter()
    for step in range(steps):
        result = train_step(
            run.model,
            run.optimizer,
            run.training_objective,
            microbatches,
            1e-6,
            run.data_parallel,
            run.pipeline,
        )
        result.loss.item()
        if step == 0 and saver is not None:
            asked = time.perf_counter()
            run.data_parallel.finish_param_sync()
            shards = model_shards(run.weights) | optimizer_shards(run.optimizer)
            saver.save(iteration, by_name(shards), {})
            held_up = time.perf_counter() - asked
    total = time.perf_counter() - began
    if saver is not None:
        saver.wait()
        on_disk = saver.collect()[-1].seconds
    return [total, held_up, on_disk]


def summary(run: Run, rounds: dict[str, list[list[float]]], options: argparse.Namespace) -> dict:
    """What is printed and written."""
    milliseconds = {}
    for mode, measured in rounds.items():
        pairs = zip(measured, rounds["none"], strict=True)
        longer = statistics.median(mine[0] - plain[0] for mine, plain in pairs)
        held_up, on_disk = (statistics.median(m[i] for m in measured) for i in (1, 2))
        milliseconds[mode] = [1e3 * seconds for seconds in (held_up, longer, on_disk)]
    step = statistics.median(m[0] for m in rounds["none"]) / options.steps
    files = list((options.folder / MODES[1]).glob("iter_*/*"))
    return {
        "processes": run.groups.world.size(),
        "steps": options.steps,
        "step milliseconds": 1e3 * step,
        "state bytes of the main process": sum(
            state_bytes(run.weights, run.optimizer.states, run.data_parallel.padding).values()
        ),
        "checkpoint bytes": sum(path.stat().st_size for path in files) // (options.rounds + 1),
        "milliseconds": {
            mode: dict(zip(COLUMNS, t, strict=True)) for mode, t in milliseconds.items()
        },
    }


def report(result: dict) -> None:
    """A row per mode."""
    print(
        f"{result['checkpoint bytes'] / 1e6:.1f} MB, {result['processes']} processes; a step takes "
        f"{result['step milliseconds']:.1f} ms"
    )
    print(f"{'':14}" + "".join(f"{column + ' ms':>18}" for column in COLUMNS))
    for mode in MODES[1:]:
        row = result["milliseconds"][mode]
        print(f"{mode:14}" + "".join(f"{row[column]:18.1f}" for column in COLUMNS))


if __name__ == "__main__":
    exit_with(main)
