"""Reduction, optimizer step and weight gather of replicas: FP8 beside the BF16 stack, one run.

torchrun --nproc-per-node=2 tools/bench_optimizer.py --config configs/gpt_mini.yaml \\
    [--steps 20] [--output FILE.json] [section.key=value ...]

Every preset gets the config's model and random gradients, and alternates with the others step by
step. Reported by the main process: milliseconds for each of the three, and bytes it sends per
parameter, medians over --steps after a warm-up. On a CPU processes share cores and gloo copies
through sockets: the ratio of bytes is the result, the times are this machine's.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from fp8lm.arguments import file_to_write, number_type
from fp8lm.comm.groups import ProcessGroups, process_groups, rank_device
from fp8lm.config import load_config
from fp8lm.data.files import write_aside
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import CommandParser, InputError
from fp8lm.training.build import Run, build
from fp8lm.training.builders import resolve_device
from fp8lm.training.memory import state_bytes

PRESETS = ("bf16", "o3")
PHASES = ("reduce", "step", "gather")
WARM_UP = 3


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=number_type(1), default=20)
    parser.add_argument("--output", type=file_to_write)
    options, overrides = parser.parse_known_args(argv)
    mock = ["data.mock_data=true", "data.data_path=null", "tokenizer.tokenizer_model=null"]
    mock += ["tokenizer.tokenizer_type=NullTokenizer", "tokenizer.vocab_size=511"]
    configs = {
        preset: load_config(options.config, [*mock, *overrides, f"precision.preset={preset}"])
        for preset in PRESETS
    }
    config = configs[PRESETS[0]]
    device = rank_device(resolve_device(config.train.device))
    stages = config.parallel.pipeline_model_parallel_size
    if stages > 1:
        raise InputError(
            f"parallel.pipeline_model_parallel_size = {stages}: a stage holds a part of the model, "
            "and replicas of whole models are measured here: set it to 1"
        )
    with process_groups(device, config.parallel) as groups:
        runs = {preset: build(config, groups, device) for preset, config in configs.items()}
        results = measure(runs, groups, options.steps)
        if groups.is_main:
            report(results)
            if options.output:
                write_aside(options.output, json.dumps(results, indent=1) + "\n")


def measure(runs: dict[str, Run], groups: ProcessGroups, steps: int) -> dict[str, dict]:
    """Medians by preset."""
    times: dict[str, dict[str, list[float]]] = {
        preset: {phase: [] for phase in PHASES} for preset in runs
    }
    sent: dict[str, dict[str, int]] = {}
    for step in range(WARM_UP + steps):
        for preset, run in runs.items():
            run.sent.take()
            for phase, seconds in one_step(run, groups, step).items():
                if step >= WARM_UP:
                    times[preset][phase].append(seconds)
            sent[preset] = run.sent.take()
    return {
        preset: {
            "processes": groups.world.size(),
            "parameters": sum(weight.spec.numel for weight in run.weights.values()),
            "milliseconds": {k: 1e3 * statistics.median(v) for k, v in times[preset].items()},
            "bytes sent": {wire: sent[preset][wire] for wire in ("grads", "params")},
            "bytes held": sum(
                state_bytes(run.weights, run.optimizer.states, run.data_parallel.padding).values()
            ),
        }
        for preset, run in runs.items()
    }


def one_step(run: Run, groups: ProcessGroups, seed: int) -> dict[str, float]:
    """Seconds of each phase; all ranks start each together."""
    generator = torch.Generator(device=run.device).manual_seed(seed)
    for weight in run.weights.values():
        weight.main_grad.zero()
        shape = weight.spec.local_shape
        weight.main_grad.add(torch.randn(shape, generator=generator, device=run.device))
    seconds = {}

    def timed(phase: str, call: Callable):  # noqa: ANN202
        groups.world.barrier().wait()
        began = time.perf_counter()
        result = call()
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[phase] = time.perf_counter() - began
        return result

    run.data_parallel.enable_grad_sync()
    gradients = timed("reduce", run.data_parallel.reduce)
    norm = timed("step", lambda: run.optimizer.step(1e-4, gradients))
    timed("gather", lambda: run.data_parallel.start_param_sync(norm.skip))
    return seconds


def report(results: dict[str, dict]) -> None:
    """A row per preset, and the ratio."""
    print(f"{'':8}" + "".join(f"{phase + ' ms':>12}" for phase in PHASES), end="")
    print(f"{'grads B/par':>14}{'params B/par':>14}{'held B/par':>14}")
    rows = {}
    for preset, result in results.items():
        count = result["parameters"]
        rows[preset] = [result["milliseconds"][phase] for phase in PHASES]
        rows[preset] += [result["bytes sent"][wire] / count for wire in ("grads", "params")]
        rows[preset].append(result["bytes held"] / count)
    pairs = zip(rows["o3"], rows["bf16"], strict=True)
    rows["o3/bf16"] = [a / b if b else float("nan") for a, b in pairs]  # one process sends nothing
    for name, row in rows.items():
        print(f"{name:8}" + "".join(f"{v:12.3f}" for v in row[:3]), end="")
        print("".join(f"{value:14.3f}" for value in row[3:]))


if __name__ == "__main__":
    exit_with(main)
