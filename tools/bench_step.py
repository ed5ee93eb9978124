"""Time one training step of each precision preset beside other programs', in one run.

python tools/bench_step.py [--hidden-size 512 --num-layers 4 ...] [--output result.json]
    [--baselines plain,compiled,torchao_tensorwise,torchao_rowwise,te_current,te_delayed]

All contestants take turns, step by step, so that whatever else the machine does hits them alike;
the table gives the median time of a step, of its optimizer (norm, clipping and update, timed once
more on the gradients of each step) and of a micro-batch (the rest, divided), the ratios of the step
to the baselines and to `bf16`, and the model's TFLOP/s (causal attention counted once;
fp8lm.training.flops). On a GPU also what a step
allocates beyond the states of all contestants. Baselines are those of tools/baselines.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch.profiler import ProfilerActivity
from tqdm import tqdm

from fp8lm.arguments import file_to_write, number_type
from fp8lm.batch import Batch
from fp8lm.comm import WireCounter
from fp8lm.config import Config, build_config
from fp8lm.config.precision import KernelsName
from fp8lm.data.files import write_aside
from fp8lm.kernels import select_kernels
from fp8lm.kernels.cuda_graph import CudaGraphs, GraphCapture
from fp8lm.model import GPTModel
from fp8lm.model.objectives import LanguageModeling, Objective
from fp8lm.optim import AdamW
from fp8lm.parallel.cuda_graphs import GraphedMicrobatches
from fp8lm.parallel.pipeline import Executor
from fp8lm.runtime.allocator import keep_freed_blocks
from fp8lm.runtime.errors import CommandParser, InputError, run_command
from fp8lm.training.builders import build_one_process, resolve_device
from fp8lm.training.flops import TERA, training_flops
from fp8lm.training.step import train_step

sys.path.insert(0, str(Path(__file__).parent))
from baselines import TITLES, build_baseline
from plain_gpt import PlainGPT, PlainTraining

LR = 1e-3
GRAPHS = "graphs"


def main(argv: list[str]) -> None:
    """Build all contestants, time them, print the table."""
    options = parse_options(argv)
    device = resolve_device(options.device)
    if options.cuda_graphs and device.type != "cuda":
        raise InputError("--cuda-graphs needs a GPU: leave it out, or use --device cuda")
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    if device.type == "cpu":
        keep_freed_blocks()  # as a training does, for all contestants
    contestants = build_contestants(options, device)
    times, allocated = measure(contestants, options.steps, device)
    rows = summarize(times, allocated, options)
    print_table(rows, options, device)
    if options.output:
        facts = {"options": vars(options), "device": describe_device(device), "rows": rows}
        write_aside(options.output, json.dumps(facts, indent=1, default=str) + "\n")
    if options.profile:
        write_aside(options.profile, profile(contestants, device))


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Sizes of the model and the measurement."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=number_type(1), default=512)
    parser.add_argument("--num-layers", type=number_type(1), default=4)
    parser.add_argument("--num-attention-heads", type=number_type(1), default=8)
    parser.add_argument("--kv-channels", type=number_type(1), help="default: hidden size / heads")
    parser.add_argument(
        "--ffn-hidden-size", type=number_type(1), help="default: four times the hidden size"
    )
    parser.add_argument("--seq-length", type=number_type(1), default=256)
    parser.add_argument("--micro-batch-size", type=number_type(1), default=8)
    parser.add_argument("--num-microbatches", type=number_type(1), default=1)
    parser.add_argument("--vocab-size", type=number_type(1), default=2048)
    parser.add_argument("--presets", default="bf16,te,o1,o2,o3")
    parser.add_argument(
        "--kernels", choices=get_args(KernelsName), default="auto", help="precision.kernels"
    )
    parser.add_argument("--baselines", default="plain", help=f"any of {', '.join(TITLES)}; or none")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="each preset with train.enable_cuda_graph, too"
    )
    parser.add_argument(
        "--steps", type=number_type(1), default=10, help="timed steps after 2 for warm-up"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num-threads", type=number_type(1))
    parser.add_argument("--output", type=file_to_write, help="write the numbers to this JSON file")
    parser.add_argument(
        "--profile",
        type=file_to_write,
        help="write PyTorch's profile of a further step to this file",
    )
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Contestant:
    """`step` takes a training step; `update` steps its optimizer again, on the same gradients."""

    step: Callable[[], Any]
    update: Callable[[], Any]


def build_contestants(
    options: argparse.Namespace,
    device: torch.device,
    capture: Callable[[torch.device], GraphCapture] = CudaGraphs,
) -> dict[str, Contestant]:
    """All contestants, on the same batch."""
    batch = make_batch(options, device)
    contestants: dict[str, Contestant] = {}
    for name in baselines_of(options):
        model = build_baseline(name, plain_model(options).to(device))
        training = PlainTraining(model, LR)
        contestants[TITLES[name]] = Contestant(partial(training.step, batch), training.update)
    for preset in options.presets.split(","):
        for name in (preset, f"{preset} {GRAPHS}") if options.cuda_graphs else (preset,):
            config = make_config(options, preset)
            kernels = select_kernels(device, options.kernels)
            trained, optimizer = build_one_process(config, options.vocab_size, kernels, device)
            objective, pipeline = LanguageModeling(kernels=kernels), None
            if name != preset:
                # The first of two steps is not captured, the second is.
                pipeline = GraphedMicrobatches(
                    trained, capture(device), WireCounter(), warmup_steps=1
                )
            contestants[name] = Contestant(
                partial(_loss_of_step, trained, optimizer, objective, batch, pipeline),
                partial(optimizer.step, LR),
            )
    return contestants


def baselines_of(options: argparse.Namespace) -> list[str]:
    """Names of the baselines, in order."""
    return options.baselines.split(",") if options.baselines not in ("", "none") else []


def plain_model(options: argparse.Namespace) -> PlainGPT:
    """The model of `make_config` without this project's layers."""
    return PlainGPT(
        options.num_layers,
        options.hidden_size,
        options.num_attention_heads,
        options.vocab_size,
        options.seq_length,
        size=options.kv_channels,
        ffn=options.ffn_hidden_size,
    )


def _loss_of_step(
    model: GPTModel,
    optimizer: AdamW,
    objective: Objective,
    batches: list[Batch],
    pipeline: Executor | None,
) -> torch.Tensor:
    return train_step(model, optimizer, objective, batches, LR, pipeline=pipeline).loss


def make_batch(options: argparse.Namespace, device: torch.device) -> list[Batch]:
    """Micro-batches of random tokens, predicted by their successors."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.micro_batch_size, options.seq_length + 1)
    batches = []
    for _ in range(options.num_microbatches):
        tokens = torch.randint(options.vocab_size, shape, generator=generator).to(device)
        mask = torch.ones(tokens[:, 1:].shape, device=device)
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:], mask))
    return batches


def make_config(options: argparse.Namespace, preset: str) -> Config:
    """The config of the same model under `preset`."""
    batch = options.micro_batch_size * options.num_microbatches
    return build_config(
        {
            "model": {
                "num_layers": options.num_layers,
                "hidden_size": options.hidden_size,
                "num_attention_heads": options.num_attention_heads,
                "kv_channels": options.kv_channels,
                "ffn_hidden_size": options.ffn_hidden_size,
                "seq_length": options.seq_length,
            },
            "precision": {"preset": preset},
            "train": {
                "micro_batch_size": options.micro_batch_size,
                "global_batch_size": batch,
                "train_iters": options.steps,
            },
            "optimizer": {"lr": LR},
            "data": {"mock_data": True},
            "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": options.vocab_size},
        }
    )


@dataclass(frozen=True)
class Times:
    """Seconds of each timed step, and of its optimizer."""

    step: list[float]
    update: list[float]


def measure(
    contestants: dict[str, Contestant], steps: int, device: torch.device
) -> tuple[dict[str, Times], dict[str, int]]:
    """Times by contestant, and bytes that a step allocates on a GPU.

    They take turns within every round.
    """
    times = {name: Times([], []) for name in contestants}
    allocated = dict.fromkeys(contestants, 0)
    for round_index in tqdm(range(steps + 2), desc="rounds", mininterval=2.0):
        for name, contestant in contestants.items():
            before = start_counting(device)
            spent = seconds_of(contestant.step, device)
            most = most_allocated(device) - before
            update = seconds_of(contestant.update, device)
            if round_index >= 2:
                times[name].step.append(spent)
                times[name].update.append(update)
                allocated[name] = max(allocated[name], most)
    return times, allocated


def seconds_of(act: Callable[[], Any], device: torch.device) -> float:
    """What `act` takes, the device's queue empty before and after."""
    synchronize(device)
    started = time.perf_counter()
    act()
    synchronize(device)
    return time.perf_counter() - started


def profile(contestants: dict[str, Contestant], device: torch.device) -> str:
    """A table for each contestant: the kernels (on a CPU the operations) of one step by time."""
    activity, order = ProfilerActivity.CPU, "self_cpu_time_total"
    if device.type == "cuda":
        activity, order = ProfilerActivity.CUDA, "self_cuda_time_total"
    tables = []
    for name, contestant in contestants.items():
        with torch.profiler.profile(activities=[activity]) as profiler:
            contestant.step()
            synchronize(device)
        tables.append(f"{name}\n{profiler.key_averages().table(sort_by=order, row_limit=60)}")
    return "\n".join(tables)


def start_counting(device: torch.device) -> int:
    """Bytes that are allocated on a GPU now; its maximum is counted anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def most_allocated(device: torch.device) -> int:
    """The maximum since `start_counting`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarize(
    times: dict[str, Times], allocated: dict[str, int], options: argparse.Namespace
) -> list[dict]:
    """Median milliseconds, tokens per second and ratios; ratios are medians of paired rounds."""
    sequences = options.micro_batch_size * options.num_microbatches
    tokens = sequences * options.seq_length
    model = make_config(options, "bf16").model
    flops = training_flops(model, options.vocab_size, [options.seq_length] * sequences)
    rows = []
    for name, of_name in times.items():
        seconds, update = of_name.step, statistics.median(of_name.update)
        median = statistics.median(seconds)
        row = {"name": name, "ms": 1e3 * median, "tokens_per_s": tokens / median}
        row["optimizer_ms"] = 1e3 * update
        row["microbatch_ms"] = 1e3 * (median - update) / options.num_microbatches
        row |= {"model_tflops": flops / median / TERA, "step_bytes": allocated[name]}
        for base in (*(TITLES[each] for each in baselines_of(options)), "bf16"):
            if base in times:
                pairs = zip(seconds, times[base].step, strict=True)
                row[f"ratio to {base}"] = statistics.median(a / b for a, b in pairs)
        rows.append(row | {"all_ms": [round(1e3 * s, 2) for s in seconds]})
    return rows


def print_table(rows: list[dict], options: argparse.Namespace, device: torch.device) -> None:
    """The table on stdout."""
    shape = f"h{options.hidden_size} L{options.num_layers} s{options.seq_length}"
    tokens = options.micro_batch_size * options.seq_length
    print(
        f"{describe_device(device)}; {shape}, {options.num_microbatches} x {tokens} tokens a step, "
        f"median of {options.steps} interleaved steps"
    )
    ratios = [key for key in rows[0] if key.startswith("ratio")]
    header = f"{'':20}{'ms/step':>10}{'optimizer':>10}{'microbatch':>11}"
    header += f"{'tokens/s':>12}{'TFLOP/s':>10}{'MiB/step':>10}"
    print(header + "".join(f"{key:>28}" for key in ratios))
    for row in rows:
        cells = "".join(f"{row[key]:>28.3f}" for key in ratios)
        line = f"{row['name']:20}{row['ms']:>10.1f}{row['optimizer_ms']:>10.1f}"
        line += f"{row['microbatch_ms']:>11.1f}{row['tokens_per_s']:>12.0f}"
        line += f"{row['model_tflops']:>10.2f}{row['step_bytes'] / 2**20:>10.0f}"
        print(line + cells)


def describe_device(device: torch.device) -> str:
    """Device and versions in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"CPU {platform.machine()}, {threads} threads, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(run_command(main))
