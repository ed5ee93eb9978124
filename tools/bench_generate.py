"""Tokens per second of generation with and without cache, and the memory that is held.

python tools/bench_generate.py --load runs/x/checkpoints [--batch-sizes 1,8] [--output bench.json]
torchrun --nproc-per-node 2 tools/bench_generate.py --tensor-model-parallel-size 2 --load ...

Prompts are random tokens, continued greedily past every end of document. After one run for warm-up,
the time of the first token is the least of the repetitions, that of a further one the median.
Memory: bytes of the weights, of the cache, and of all tensors that are alive once the model is
loaded, on this rank.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from statistics import median
from typing import Any, NamedTuple

import torch

from fp8lm.arguments import file_to_write, number_type
from fp8lm.data.files import write_aside
from fp8lm.generate.context import CachedContext, Context, RecomputedContext
from fp8lm.generate.loading import add_model_arguments, model_of_options
from fp8lm.generate.model import InferenceModel
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import CommandParser, InputError
from fp8lm.runtime.output import show
from fp8lm.training.memory import live_tensor_bytes

Kind = type[CachedContext] | type[RecomputedContext]
WAYS: dict[str, tuple[Kind, str]] = {
    "cache": (CachedContext, "auto"),
    "fp8 cache": (CachedContext, "fp8"),
    "no cache": (RecomputedContext, "auto"),
}
MEGA = 1e6


def main(argv: list[str]) -> None:
    """Measure every way and batch size, print a line for each, write the file."""
    options = parse_options(argv)
    with model_of_options(options) as model:
        if options.prompt_tokens + options.max_new_tokens > model.context_length:
            raise InputError(
                f"--prompt-tokens {options.prompt_tokens} and --max-new-tokens "
                f"{options.max_new_tokens} exceed the model's context of {model.context_length}"
            )
        held = live_tensor_bytes()
        say = show if model.groups.is_main else (lambda text: None)
        heads = ("prompt tok/s", "new tok/s", "CPU ms/step", "cache MB")
        say(f"{'way':10} {'batch':>5} " + " ".join(f"{head:>12}" for head in heads))
        rows = []
        for batch in options.batch_sizes:
            for way in WAYS:
                rows.append(measure(model, way, batch, options))
                say(line(rows[-1]))
        facts = {
            "model": model.config.model.model_dump(mode="json"),
            "precision": model.config.precision.preset,
            "layout": {"tp": model.groups.dims.tp, "pp": model.groups.dims.pp},
            "device": device_name(model.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processors": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.max_new_tokens,
            "weight_bytes": model.weight_bytes,
            "tensor_bytes": held,
            "results": rows,
        }
        say(f"weights {model.weight_bytes / MEGA:.1f} MB, all tensors {held / MEGA:.1f} MB")
        if options.output is not None and model.groups.is_main:
            write_aside(options.output, json.dumps(facts, indent=1) + "\n")


def parse_options(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add = parser.add_argument_group("benchmark").add_argument
    add("--batch-sizes", type=sizes, default=[1, 8], help="prompts at once (default: 1,8)")
    add("--prompt-tokens", type=number_type(1), default=128)
    add("--max-new-tokens", type=number_type(2), default=32)
    add("--repeats", type=number_type(1), default=2)
    add("--output", type=file_to_write, help="write the numbers to this JSON file")
    return parser.parse_args(argv)


def sizes(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [number_type(1)(part) for part in text.split(",")]


def measure(
    model: InferenceModel, way: str, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of the first new token, and of a further one, for `batch` prompts.

    `token_cpu_s` is what a further one takes of processors: a busy machine does not change it.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch, options.prompt_tokens)
    prompts = torch.randint(model.num_ids, shape, generator=generator).tolist()
    runs = [times(model, prompts, way, options.max_new_tokens) for _ in range(options.repeats + 1)]
    first = min(run[0].wall for run in runs[1:])
    further = [time for run in runs[1:] for time in run[1:]]
    each = median(time.wall for time in further)
    context = new_context(model, way, batch, sum((options.prompt_tokens, options.max_new_tokens)))
    return {
        "way": way,
        "batch": batch,
        "first_token_s": first,
        "token_s": each,
        "token_cpu_s": median(time.cpu for time in further),
        "prompt_tokens_per_s": batch * options.prompt_tokens / first,
        "new_tokens_per_s": batch / each,
        "cache_bytes": context.cache.nbytes if isinstance(context, CachedContext) else 0,
    }


class Seconds(NamedTuple):
    """By the clock, and of all processors for this process."""

    wall: float
    cpu: float


def times(model: InferenceModel, prompts: list[list[int]], way: str, count: int) -> list[Seconds]:
    """Those of each of `count` tokens that follow `prompts`, greedily."""
    context = new_context(model, way, len(prompts), len(prompts[0]) + count)
    found, new = [], prompts
    for _ in range(count):
        began = time.perf_counter(), time.process_time()
        logits = context.extend(new)  # on the host: nothing is under way any more
        new = [[token] for token in logits.argmax(dim=1).tolist()]
        ended = time.perf_counter(), time.process_time()
        found.append(Seconds(ended[0] - began[0], ended[1] - began[1]))
    return found


def new_context(model: InferenceModel, way: str, sequences: int, capacity: int) -> Context:
    """An empty one that computes in this `way`."""
    kind, cache_dtype = WAYS[way]
    return kind(model, sequences, capacity, cache_dtype)


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{row['way']:10} {row['batch']:5} {row['prompt_tokens_per_s']:12.1f} "
        f"{row['new_tokens_per_s']:12.1f} {row['token_cpu_s'] * 1000:12.1f} "
        f"{row['cache_bytes'] / MEGA:12.2f}"
    )


if __name__ == "__main__":
    exit_with(main)
