"""Where FP8 pays: predicted speed of a layer to BF16 by hidden size and tokens of a micro-batch.

python tools/crossover.py [--hidden-size 512 1024 ...] [--tokens 1024 4096 ...] [--preset te o3]
    [--config configs/gpt_7b.yaml] [--hardware configs/hardware/h200.yaml] [--json FILE]

Each cell is a trace as of tools/trace_step.py, of a layer and a further micro-batch on one rank
with heads of 128 features and the config's kind of layer: time in BF16 over time in the preset.
Small layers lose, because FP8 adds launches (casts, amaxes), and a launch takes its least time
however little it does. What the host needs to launch them is not in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from tqdm import tqdm

from fp8lm.arguments import as_path, file_to_write, number_type
from fp8lm.config import Config, load_config
from fp8lm.data.files import write_aside
from fp8lm.data.tokenizer import build_tokenizer
from fp8lm.planner.tracing.costs import FURTHER
from fp8lm.planner.tracing.model import trace_model
from fp8lm.planner.tracing.roofline import Hardware
from fp8lm.runtime.errors import CommandParser, InputError, run_command
from fp8lm.training.flops import TERA, layer_flops

ROOT = Path(__file__).parents[1]
HEAD = 128
SEQUENCE = 2048


def main(argv: list[str]) -> None:
    """Trace all cells, print a table for each preset, write the numbers."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    add, count = parser.add_argument, number_type(1)
    add("--config", default=str(ROOT / "configs/gpt_7b.yaml"))
    add("--hardware", type=as_path, default=ROOT / "configs/hardware/h200.yaml")
    add("--preset", nargs="+", default=["te", "o3", "o3_long"])
    add("--hidden-size", type=count, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    add("--tokens", type=count, nargs="+", default=[1024, 4096, 16384], help="of a micro-batch")
    add("--json", type=file_to_write, help="write the numbers to this file")
    options = parser.parse_args(argv)
    hardware = Hardware.read(options.hardware)
    cells = []
    for hidden, tokens in tqdm(list(product(options.hidden_size, options.tokens)), disable=None):
        configs = {
            preset: sized(options.config, preset, hidden, tokens)
            for preset in dict.fromkeys(("bf16", *options.preset))
        }
        seconds = {preset: layer_seconds(config, hardware) for preset, config in configs.items()}
        speeds = {preset: seconds["bf16"] / seconds[preset] for preset in options.preset}
        flops = layer_flops(configs["bf16"])
        cells.append(dict(hidden_size=hidden, tokens=tokens, tflop=flops / TERA, speed=speeds))
    print(f"speed of a layer to bf16, predicted for {hardware.name}")
    for preset in options.preset:
        print(table(preset, cells, options.tokens))
    if options.json:
        facts = {"config": options.config, "hardware": options.hardware.name, "cells": cells}
        write_aside(options.json, json.dumps(facts, indent=1) + "\n")


def sized(path: str, preset: str, hidden: int, tokens: int) -> Config:
    """The config at `path` under `preset` of these sizes; InputError for what it cannot have."""
    sequence = min(SEQUENCE, tokens)
    if tokens % sequence or tokens % 16 or hidden % 16:
        raise InputError(
            f"--tokens {tokens}, --hidden-size {hidden}: an FP8 GEMM takes multiples of 16, and "
            f"more than {SEQUENCE} tokens are whole sequences of as many"
        )
    return load_config(
        path,
        [
            f"precision.preset={preset}",
            f"model.hidden_size={hidden}",
            f"model.num_attention_heads={max(1, hidden // HEAD)}",
            f"model.seq_length={sequence}",
            f"train.micro_batch_size={tokens // sequence}",
            f"train.global_batch_size={4 * (tokens // sequence)}",
            "train.rampup_batch_size=null",
        ],
    )


def layer_seconds(config: Config, hardware: Hardware) -> float:
    """Of a layer and a further micro-batch, with the Triton kernels."""
    num_ids = build_tokenizer(config.tokenizer).vocab_size
    return trace_model(config, num_ids, hardware, "triton").layer.cost.total(FURTHER).seconds


def table(preset: str, cells: Sequence[dict], tokens: Sequence[int]) -> str:
    """Rows of hidden sizes, columns of tokens."""
    lines = [f"\n{preset:>8}" + "".join(f"{count:>8}" for count in tokens) + "  tokens"]
    for hidden in dict.fromkeys(cell["hidden_size"] for cell in cells):
        row = [cell["speed"][preset] for cell in cells if cell["hidden_size"] == hidden]
        lines.append(f"{hidden:>8}" + "".join(f"{speed:>8.2f}" for speed in row))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
