"""Time the operations of a training step on a device: share of its bandwidth, of its best GEMM.

python tools/bench_kernels.py [--hidden-size 4096 --ffn-hidden-size 16384] \\
    [--tokens 2048 4096 8192] [--device cuda] [--json kernels.json]

    copy          a copy of a large tensor: the bandwidth that others are measured by
    gemm          forward, dgrad and wgrad of the four linear layers of a transformer layer in BF16
                  and FP8, in TFLOP/s
    operations    of every backend that runs here, in microseconds and as a share of the copy's
                  bandwidth, for the bytes that a fused operation has to move: each operand once
    adam          a step of one weight in the formats of a preset

The same on a CPU, where it only shows that all of it runs. Times are medians of
torch.utils.benchmark, which waits for the device.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from bench_step import describe_device

from fp8lm.arguments import file_to_write, finite, number_type
from fp8lm.config.precision import KernelsName, PrecisionConfig
from fp8lm.config.presets import PresetName
from fp8lm.data.files import write_aside
from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.hopper import HopperKernels
from fp8lm.kernels.interface import Kernels
from fp8lm.kernels.rounding import ElementIndex
from fp8lm.kernels.select import select_kernels, why_not_compiled
from fp8lm.numerics import BF16, E2M5, E4M3, E5M2, FP32, Format, format_by_name, granularity_of
from fp8lm.optim import StatePrecision
from fp8lm.runtime.errors import CommandParser, run_command
from fp8lm.scaled_tensor import ScaledTensor
from fp8lm.training.builders import resolve_device

MICROSECONDS = 1e6


@dataclass(frozen=True)
class Row:
    """An operation: `bytes_moved` at least, or `flops`, in `microseconds`; `share` of the copy."""

    name: str
    backend: str
    shape: tuple[int, ...]
    microseconds: float
    bytes_moved: int = 0
    flops: float = 0.0
    share: float | None = None


@dataclass(frozen=True)
class Operation:
    """`run` of a backend on tensors that are made; what a fused one has to move."""

    name: str
    shape: tuple[int, ...]
    run: Callable[[], Any]
    bytes_moved: int = 0
    flops: float = 0.0


def main(argv: list[str]) -> None:
    """Time all, print, write."""
    options = parse_options(argv)
    device = resolve_device(options.device)
    copied = time_copy(device, options)
    bandwidth = copied.bytes_moved / copied.microseconds
    rows = [copied]
    for backend, kernels in backends(device).items():
        for operation in tqdm(operations(kernels, device, options), unit="operation", disable=None):
            spent = microseconds(operation.run, options.seconds)
            share = operation.bytes_moved / spent / bandwidth if operation.bytes_moved else None
            sizes = (operation.bytes_moved, operation.flops)
            rows.append(Row(operation.name, backend, operation.shape, spent, *sizes, share))
    print_table(rows)
    if options.json:
        facts = {"device": describe_device(device), "rows": [asdict(row) for row in rows]}
        write_aside(options.json, json.dumps(facts, indent=1) + "\n")


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Sizes of a layer and of the measurement."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=number_type(16), default=4096)
    parser.add_argument("--ffn-hidden-size", type=number_type(16), default=16384)
    parser.add_argument("--tokens", type=number_type(16), nargs="+", default=[2048, 4096, 8192])
    parser.add_argument(
        "--copy-mib", type=number_type(1), default=1024, help="size of the copied tensor"
    )
    parser.add_argument("--seconds", type=finite, default=0.1, help="for each; default: 0.1")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=file_to_write, help="where to write the rows")
    options = parser.parse_args(argv)
    sizes = (options.hidden_size, options.ffn_hidden_size, *options.tokens)
    if any(size % 16 for size in sizes):
        parser.error("--hidden-size, --ffn-hidden-size and --tokens are multiples of 16")
    return options


def backends(device: torch.device) -> dict[str, Kernels]:
    """Those that run on `device`."""
    if device.type == "cpu":
        names: tuple[KernelsName, ...] = ("eager", "compiled")
        here = names[: 1 if why_not_compiled() else 2]
        return {name: select_kernels(device, name) for name in here}
    found: dict[str, Kernels] = {"eager": HopperKernels()}
    if find_spec("triton") is not None:
        from fp8lm.kernels.triton.backend import TritonKernels

        found["triton"] = TritonKernels()
    return found


def microseconds(run: Callable[[], Any], seconds: float) -> float:
    """The median of as many runs as take `seconds`."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    timer.timeit(2)
    return timer.blocked_autorange(min_run_time=seconds).median * MICROSECONDS


def time_copy(device: torch.device, options: argparse.Namespace) -> Row:
    """A copy of bytes."""
    source = torch.zeros(options.copy_mib << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = microseconds(lambda: target.copy_(source), options.seconds)
    return Row("copy", "torch", tuple(source.shape), spent, 2 * source.numel(), share=1.0)


def operations(
    kernels: Kernels, device: torch.device, options: argparse.Namespace
) -> Iterator[Operation]:
    """All that are timed, for every number of tokens."""
    hidden, ffn = options.hidden_size, options.ffn_hidden_size
    weights = {"qkv": (3 * hidden, hidden), "proj": (hidden, hidden)}
    weights |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
    for tokens in options.tokens:
        for name, (rows, columns) in weights.items():
            yield from gemms(kernels, device, name, tokens, rows, columns)
        yield from casts(kernels, device, tokens, ffn)
    for fmt in (E4M3, E2M5, BF16, FP32):
        yield accumulation(kernels, device, fmt, ffn, hidden)
    for preset in ("bf16", "o3", "o3_long", "o4"):
        yield adam_step(kernels, device, preset, (ffn, hidden))


def gemms(
    kernels: Kernels, device: torch.device, name: str, tokens: int, rows: int, columns: int
) -> Iterator[Operation]:
    """The three products of a weight [rows, columns]."""
    products = {
        "forward": (tokens, rows, columns, E4M3),
        "dgrad": (tokens, columns, rows, E5M2),
        "wgrad": (rows, columns, tokens, E5M2),
    }
    for kind, (m, n, k, fmt) in products.items():
        for fast in (True, False) if kind == "forward" else (False,):
            for a_format, b_format in ((fmt, E4M3), (BF16, BF16)):
                if a_format == BF16 and fast:
                    continue
                a = kernels.quantize(random((m, k), device), a_format)
                b = kernels.quantize(random((n, k), device), b_format)
                label = f"gemm {kind} {name} {'fp8' if a_format.scaled else 'bf16'}"
                yield Operation(
                    f"{label}{' fast' if fast else ''}",
                    (m, n, k),
                    partial(kernels.gemm, a, b, fast_accumulation=fast),
                    flops=2.0 * m * n * k,
                )


def casts(kernels: Kernels, device: torch.device, tokens: int, width: int) -> Iterator[Operation]:
    """Between BF16 and FP8; the amax takes a second reading of the input."""
    shape, elements = (tokens, width), tokens * width
    x = random(shape, device)
    amax = kernels.amax(x)
    payload = kernels.quantize(x, E4M3)

    def operation(name: str, run: Callable[[], Any], bytes_of_element: int) -> Operation:
        return Operation(name, shape, run, bytes_of_element * elements)

    yield operation("amax", partial(kernels.amax, x), 2)
    for fmt in (E4M3, E5M2):
        name, quantize = fmt.name.removeprefix("fp8_"), partial(kernels.quantize, x, fmt)
        yield operation(f"amax and cast to {name}", quantize, 5)
        yield operation(f"cast to {name}", partial(quantize, amax=amax), 3)
        both = partial(kernels.quantize_with_transpose, x, fmt, amax=amax)
        yield operation(f"cast and transpose to {name}", both, 4)
    yield operation("transpose", partial(transposed, kernels, payload), 2)
    yield operation("dequantize to fp32", partial(kernels.dequantize, payload), 5)
    yield operation("square sum and amax", partial(kernels.square_sums_and_amaxes, [payload]), 1)


def transposed(kernels: Kernels, x: ScaledTensor) -> Tensor:
    """The payload of the transposed `x`, made even where a view would do."""
    return kernels.transpose(x).payload.contiguous()


def accumulation(
    kernels: Kernels, device: torch.device, fmt: Format, rows: int, columns: int
) -> Operation:
    """The addition of a weight's gradient; one scale per tensor takes a second reading."""
    shape = (rows, columns)
    held = ScaledTensor.zeros(shape, fmt, device, granularity_of(fmt, shape))
    total = held.elements(0, math.prod(shape))
    x = random(shape, device).reshape(total.shape)
    kernels.accumulate_(total, x)
    passes = 2 if fmt == E4M3 else 1
    moved = math.prod(shape) * (passes * (2 + fmt.bytes) + fmt.bytes)
    moved += 2 * held.scale.nbytes if fmt.scaled else 0
    return Operation(f"accumulate in {fmt}", shape, partial(kernels.accumulate_, total, x), moved)


def adam_step(
    kernels: Kernels, device: torch.device, preset: PresetName, shape: tuple[int, int]
) -> Operation:
    """A step of a weight; reads the gradient, reads and writes the states, writes the weight."""
    precision = PrecisionConfig(preset=preset)
    states, stored = StatePrecision.from_config(precision), format_by_name(precision.params_dtype)
    gradient = format_by_name(precision.main_grads_dtype)
    w, g = (random(shape, device).float() for _ in range(2))

    def quantize(x: Tensor, fmt: Format) -> ScaledTensor:
        return kernels.quantize(x.clone(), fmt, granularity=granularity_of(fmt, shape))

    param = AdamParam(
        row=0,
        gradient=quantize(g, gradient),
        model_param=quantize(w, stored) if states.master is not None else None,
        master=quantize(w, states.master or stored),
        exp_avg=quantize(g, states.exp_avg),
        exp_avg_sq=quantize(g.square(), states.exp_avg_sq),
        weight_decay=0.1,
        index=ElementIndex(),
    )
    # Scales stay as they are: the values hardly move.
    scales = torch.stack([x.scale for x in (param.model_param or param.master, *param.states)])
    keys = torch.zeros(1, dtype=torch.int32, device=device)
    table = AdamTable(scales[None], keys, states.rounding)
    one = torch.ones((), device=device)
    cut = 10.0 * one if states.exp_avg_sq.root else None
    scalars = AdamCoefficients(0.9, 0.95, 1e-8, 1e-6, one, one, one, cut, None)
    element = gradient.bytes + sum(2 * state.format.bytes for state in param.states)
    element += 0 if param.model_param is None else stored.bytes
    run = partial(kernels.adam, [param], table, scalars)
    return Operation(f"adam {preset}", shape, run, element * w.numel())


def random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Normal numbers in BF16."""
    return torch.randn(shape, device=device).to(torch.bfloat16)


def print_table(rows: list[Row]) -> None:
    """A line for each."""
    header = f"{'operation':34}{'backend':>8}{'shape':>22}"
    print(f"{header}{'us':>11}{'GB/s':>9}{'share':>7}{'TFLOP/s':>9}")
    for row in rows:
        line = f"{row.name:34}{row.backend:>8}{'x'.join(map(str, row.shape)):>22}"
        line += f"{row.microseconds:11.1f}"
        if row.share is not None:
            line += f"{row.bytes_moved / row.microseconds / 1e3:9.1f}{row.share:7.2f}"
        if row.flops:
            line += f"{row.flops / row.microseconds / 1e6:25.1f}"
        print(line)


if __name__ == "__main__":
    sys.exit(run_command(main))
