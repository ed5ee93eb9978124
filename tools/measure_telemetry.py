"""What the statistics of logging.fp8_stats_interval cost on a GPU, predicted without one.

python tools/measure_telemetry.py --config configs/gpt_7b.yaml [--interval 100] \\
    [--micro-batches 4] [--hardware FILE] [--json cost.json] [section.key=value ...]

A step is traced on the meta device (as tools/trace_step.py does it) with statistics of all layers
and without: launches, bytes of device memory, and the time that these bytes and the arithmetic
take, or that launching takes where it is longer. Of `interval` steps one is observed, and the
others are as without.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from fp8lm.arguments import as_path, file_to_write, finite, number_type, split_overrides
from fp8lm.config import load_config
from fp8lm.data.files import write_aside
from fp8lm.data.tokenizer import build_tokenizer
from fp8lm.planner.tracing.costs import FIRST, FURTHER, ONCE, Cost
from fp8lm.planner.tracing.model import trace_model
from fp8lm.planner.tracing.roofline import Hardware
from fp8lm.planner.tracing.run import KERNELS
from fp8lm.runtime.errors import CommandParser, run_command

HARDWARE = Path(__file__).parents[1] / "configs/hardware/h100.yaml"


def main(argv: list[str]) -> None:
    """Trace both steps, print, and write what was asked for."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", required=True)
    add("--interval", type=number_type(1), default=100, help="default: 100")
    add("--micro-batches", type=number_type(1), default=4, help="of a step; default: 4")
    add("--launch-us", type=finite, default=5.0, help="microseconds of a launch; default: 5")
    add("--hardware", type=as_path, default=HARDWARE, help="a file of configs/hardware")
    add("--kernels", choices=KERNELS, help="default: those that a Hopper GPU gets")
    add("--json", type=file_to_write, help="write the numbers to this file")
    argv, overrides = split_overrides(argv)
    options = parser.parse_args(argv)
    hardware = Hardware.read(options.hardware)
    config = load_config(options.config, overrides)
    num_ids = build_tokenizer(config.tokenizer).vocab_size
    stages = config.parallel.pipeline_model_parallel_size
    costs = {}
    for name in ("plain", "observed"):
        observed = name == "observed"
        model = trace_model(config, num_ids, hardware, options.kernels, observed=observed)
        step = model.of_layers(config.model.num_layers // stages).cost
        further = step.total(FURTHER).times(options.micro_batches - 1)
        costs[name] = step.total(FIRST) + further + step.total(ONCE)
    seconds = {name: duration(cost, options.launch_us * 1e-6) for name, cost in costs.items()}
    share = (seconds["observed"] / seconds["plain"] - 1) / options.interval
    for name, cost in costs.items():
        print(
            f"{name:10}{cost.launches:8.0f} launches {cost.moved / 1e9:8.1f} GB moved "
            f"{seconds[name] * 1e3:8.1f} ms on {hardware.name}"
        )
    print(f"at an interval of {options.interval}: {100 * share:.2f} % of the time of a step")
    if options.json:
        shown = {
            "config": options.config,
            "overrides": overrides,
            "micro_batches": options.micro_batches,
            "interval": options.interval,
            "hardware": hardware.name,
            "share": share,
            "seconds": seconds,
            **{name: asdict(cost) for name, cost in costs.items()},
        }
        write_aside(options.json, json.dumps(shown, indent=1) + "\n")


def duration(cost: Cost, launch: float) -> float:
    """Seconds of a step: of its bytes and arithmetic, or of its launches if they take longer."""
    return max(cost.seconds, cost.launches * launch)


if __name__ == "__main__":
    sys.exit(run_command(main))
