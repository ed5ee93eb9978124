"""Memory, bytes on the wires and time of a run on so many GPUs, without any.

python tools/plan.py --config configs/gpt_7b.yaml [--world-size 32] [--gpu h100] \\
    [--preset o3 te ...] [--json plan.json] [--output plan.png] [section.key=value ...]
python tools/plan.py --config configs/gpt_175b.yaml --world-size 1024 --sweep

Weights, gradients and optimizer states are those that a run would hold, byte for byte, and so are
the bytes that ranks send. Activations and the kernels' time come from a step that is traced on the
meta device (see tools/trace_step.py). `bf16` is always shown to compare with.

With --sweep, tensor and pipeline parallelism, micro-batch and recomputation are chosen for the
number of GPUs; the best few are shown, and why the others lose.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from fp8lm.arguments import file_to_write, number_type, path_text, split_overrides
from fp8lm.config import load_config
from fp8lm.data.files import write_aside
from fp8lm.data.tokenizer import build_tokenizer
from fp8lm.pictures import picture_path
from fp8lm.planner.estimate import Estimate, as_facts, estimate
from fp8lm.planner.layout import plan_layout
from fp8lm.planner.report import heading, plot, table
from fp8lm.planner.sweep import Sweep, Tried, describe, divisions, facts
from fp8lm.planner.tracing.roofline import Hardware
from fp8lm.runtime.errors import CommandParser, InputError, run_command

BASELINE = "bf16"


def main(argv: list[str]) -> None:
    """Estimate all presets, or search; print the table, write the files."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", required=True)
    add("--world-size", type=number_type(1), help="GPUs; default: one replica")
    add("--gpu", type=path_text, default="h100", help="of configs/hardware, or a FILE.yaml")
    add("--preset", nargs="+", help="default: the config's; bf16 is always shown too")
    add("--sweep", action="store_true", help="search layout, micro-batch and recomputation")
    add("--json", type=file_to_write, help="write the numbers to this file")
    add("--output", type=picture_path, help="draw memory and time to this PNG or other picture")
    argv, overrides = split_overrides(argv)
    options = parser.parse_args(argv)
    hardware = Hardware.find(options.gpu)
    config = load_config(options.config, overrides)
    parallel = config.parallel
    replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    world_size = options.world_size or replica
    if options.sweep:
        if options.preset or options.output:
            raise InputError("--sweep is for the config's preset: drop --preset and --output")
        numbers = search(options.config, overrides, world_size, hardware)
    else:
        presets = [config.precision.preset, *(options.preset or []), BASELINE]
        estimates = {
            preset: estimated(options.config, overrides, preset, world_size, hardware)
            for preset in tqdm(dict.fromkeys(presets), unit="preset", leave=False, disable=None)
        }
        numbers = report(estimates, options)
    if options.json:
        shown = {
            "config": options.config,
            "overrides": overrides,
            "world_size": world_size,
            "gpu": {"file": options.gpu, **hardware.model_dump()},
            **numbers,
        }
        write_aside(options.json, json.dumps(shown, indent=1) + "\n")


def estimated(
    path: str, overrides: list[str], preset: str, world_size: int, hardware: Hardware
) -> Estimate:
    """The estimate of the config at `path` with `overrides`, under `preset`."""
    config = load_config(path, [*overrides, f"precision.preset={preset}"])
    num_ids = build_tokenizer(config.tokenizer).vocab_size
    node_size = min(world_size, config.parallel.node_size or hardware.gpus_per_node)
    layout = plan_layout(config, num_ids, world_size, node_size)
    return estimate(layout, num_ids, hardware)


def report(estimates: Mapping[str, Estimate], options: Namespace) -> dict[str, object]:
    """Print the table and draw the picture; the numbers, those of the config's preset first."""
    own = next(iter(estimates.values()))
    print(heading(own))
    print(table(estimates, BASELINE))
    if options.output:
        plot(estimates, f"{Path(options.config).stem}: {heading(own)}", options.output)
    presets = {preset: as_facts(of) for preset, of in estimates.items()}
    return {**next(iter(presets.values())), "presets": presets}


def search(
    path: str, overrides: list[str], world_size: int, hardware: Hardware
) -> dict[str, object]:
    """Print the best layouts and why the others lose; the numbers."""
    config = load_config(path, overrides)
    num_ids = build_tokenizer(config.tokenizer).vocab_size
    trying, tried = Sweep(num_ids, world_size, hardware), []
    for division in tqdm(
        divisions(config, world_size, hardware), unit="layout", leave=False, disable=None
    ):
        try:
            divided = load_config(path, [*overrides, *division.overrides])
            tried += trying.of(divided, division)
        except InputError as error:
            tried.append(Tried(division, refused=str(error)))
    print(describe(tried, world_size, hardware))
    return {"best": facts(tried)}


if __name__ == "__main__":
    sys.exit(run_command(main))
