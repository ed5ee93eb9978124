"""Format and scales of output gradients: what dgrad and wgrad make of them.

python tools/measure_output_gradients.py --config configs/quickstart.yaml [--after 0 20 400] \\
    [--json output_gradients.json] [section.key=value ...]

Trains the config's model in BF16 on one process. After each number of steps the inputs x [T,I] and
output gradients dy [T,O] of all linear layers are taken, of one micro-batch that is not trained
on. W and x are cast to E4M3 and dy as every scheme says; dx = dy W and dw = dy^T x of what was
cast are compared with those of the BF16 tensors, in fp64:

    dy, dx, dw   signal to noise in dB, of each layer: the median of all layers and the worst
    tokens       of dx, of each token (row): the worst hundredth of all tokens of a layer,
                 which are those with the least gradient where all have one scale
    zero         share of dy that is not 0 and becomes 0

    FORMAT, tensor     one scale for dy
    FORMAT, row        a scale per row of what a GEMM reads: a token in dgrad, a feature in wgrad
    FORMAT, 1 x 128    a scale per 128 elements of such a row
    ... throughout     x and W have such scales, too
    exact              dy as it is: what the casts of x and W leave
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from measure_reduction import gradients_of

from fp8lm.arguments import file_to_write, split_overrides
from fp8lm.batch import Batch
from fp8lm.comm.groups import process_groups
from fp8lm.config import load_config
from fp8lm.data.files import write_aside
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.quantizer import Quantizer, TensorKind, quantizers_of
from fp8lm.numerics import BF16, BLOCK_1X128, E4M3, E5M2, PER_ROW, PER_TENSOR, Format, Granularity
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import CommandParser
from fp8lm.scaled_tensor import ScaledTensor
from fp8lm.training.build import Run, build
from fp8lm.training.evaluation import run_batches
from fp8lm.training.step import train_step

CPU = torch.device("cpu")
KERNELS = ReferenceKernels()
SILENT = 0.01  # the share of tokens that the worst hundredth is of


@dataclass(frozen=True)
class Scheme:
    """Format and granularity of dy, and the granularity of x and W, which are E4M3."""

    format: Format
    granularity: Granularity = PER_TENSOR
    others: Granularity = PER_TENSOR


SCHEMES = {
    "E5M2, tensor": Scheme(E5M2),
    "E4M3, tensor": Scheme(E4M3),
    "E5M2, row": Scheme(E5M2, PER_ROW),
    "E4M3, row": Scheme(E4M3, PER_ROW),
    "E4M3, 1 x 128": Scheme(E4M3, BLOCK_1X128),
    "E5M2, row throughout": Scheme(E5M2, PER_ROW, PER_ROW),
    "E4M3, row throughout": Scheme(E4M3, PER_ROW, PER_ROW),
    "exact": Scheme(BF16),
}


@dataclass(frozen=True)
class Operands:
    """Input [T,I], output gradient [T,O] and weight [O,I] of one layer, in BF16."""

    x: Tensor
    dy: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Row:
    """One layer under one scheme; SNR in dB, None for no noise. See the module."""

    scheme: str
    after_steps: int
    layer: str
    dy_snr: float | None
    dx_snr: float | None
    dw_snr: float | None
    token_snr: float | None
    zeroed: float


def main(argv: list[str]) -> None:
    """Train, measure, print and write."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument(
        "--after", type=int, nargs="+", default=[0, 20, 400], help="steps; default: 0 20 400"
    )
    parser.add_argument("--json", type=file_to_write, help="where to write the rows")
    argv, overrides = split_overrides(argv)
    options = parser.parse_args(argv)
    if min(options.after) < 0:
        parser.error("--after is at least 0")
    config = load_config(options.config, [*overrides, "precision.preset=bf16", "logging.dir=null"])
    with process_groups(CPU) as groups:
        measured = measure_run(build(config, groups, CPU), sorted(set(options.after)))
    rows = [
        of_layer(scheme, step, layer, operands)
        for step, layers in measured.items()
        for scheme in SCHEMES
        for layer, operands in layers.items()
    ]
    print_table(rows)
    if options.json:
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        write_aside(options.json, f"[\n{lines}\n]\n")


def measure_run(run: Run, steps: list[int]) -> dict[int, dict[str, Operands]]:
    """Train to the last of `steps`; the operands of all layers after each of them."""
    found, consumed = {}, 0
    batches = run_batches(run, run.train_dataset, 0)
    for step in tqdm(range(steps[-1] + 1), unit="step", disable=None):
        microbatches = batches.next(run.batch_size.num_microbatches(consumed))
        if step in steps:
            found[step] = operands_of(run, microbatches[0])
        if step == steps[-1]:
            break
        rate = run.learning_rate.rate(step, consumed)
        train_step(run.model, run.optimizer, run.training_objective, microbatches, rate)
        consumed = batches.consumed_samples
    return found


def operands_of(run: Run, batch: Batch) -> dict[str, Operands]:
    """Of every linear layer, by its path."""
    taken: dict[tuple[str, TensorKind], Tensor] = {}
    quantizers = {
        key: quantizer for key, quantizer in quantizers_of(run.model).items() if key[1] != "weight"
    }

    def keep(key: tuple[str, TensorKind], x: Tensor, quantized: ScaledTensor) -> None:
        taken[key] = x.detach().clone()

    for key, quantizer in quantizers.items():
        quantizer.observer = lambda x, quantized, key=key: keep(key, x, quantized)
    gradients_of(run, batch)
    for quantizer in quantizers.values():
        quantizer.observer = None
    return {
        layer: Operands(
            taken[layer, "input"],
            taken[layer, "grad_output"],
            KERNELS.dequantize(run.weights[f"{layer}.weight"].model_param),
        )
        for layer, kind in quantizers
        if kind == "input"
    }


def of_layer(name: str, steps: int, layer: str, operands: Operands) -> Row:
    """What the scheme `name` does to a layer."""
    scheme = SCHEMES[name]
    of_dy = Quantizer(scheme.format, KERNELS, granularity=scheme.granularity)
    of_others = Quantizer(E4M3, KERNELS, granularity=scheme.others)
    x, dy, weight = operands.x, operands.dy, operands.weight
    true_dx, true_dw = dy.double() @ weight.double(), dy.double().t() @ x.double()
    stored = _values(of_dy(dy))
    dx = stored @ _values(of_others.along_columns(weight))
    dw = _values(of_dy.along_columns(dy)).t() @ _values(of_others.along_columns(x))
    signal, noise = true_dx.square().sum(1), (dx - true_dx).square().sum(1)
    tokens = (signal / noise)[signal > 0]
    return Row(
        scheme=name,
        after_steps=steps,
        layer=layer,
        dy_snr=_snr(stored, dy.double()),
        dx_snr=_snr(dx, true_dx),
        dw_snr=_snr(dw, true_dw),
        token_snr=_decibel(tokens.quantile(SILENT)),
        zeroed=((stored == 0) & (dy != 0)).double().mean().item(),
    )


def _values(x: ScaledTensor) -> Tensor:
    return KERNELS.dequantize(x).double()


def _snr(found: Tensor, true: Tensor) -> float | None:
    return _decibel(true.square().sum() / (found - true).square().sum())


def _decibel(ratio: Tensor) -> float | None:
    """None for infinity, and for 0 / 0."""
    value = ratio.item()
    return 10 * math.log10(value) if math.isfinite(value) and value > 0 else None


def print_table(rows: list[Row]) -> None:
    """A line per scheme and number of steps."""
    by_scheme: Mapping[tuple[int, str], list[Row]] = {
        (row.after_steps, row.scheme): [
            other
            for other in rows
            if (other.after_steps, other.scheme) == (row.after_steps, row.scheme)
        ]
        for row in rows
    }
    print(
        f"{'steps':>6}  {'scheme':22}" + "".join(f"{t:>14}" for t in ("dy", "dx", "dw", "tokens"))
    )
    for (steps, scheme), own in by_scheme.items():
        cells = [
            _median_and_worst([getattr(row, key) for row in own])
            for key in ("dy_snr", "dx_snr", "dw_snr", "token_snr")
        ]
        zeroed = statistics.fmean(row.zeroed for row in own)
        cells_text = "".join(f"{cell:>14}" for cell in cells)
        print(f"{steps:6}  {scheme:22}{cells_text}  zero {100 * zeroed:.3f} %")


def _median_and_worst(values: list[float | None]) -> str:
    known = [math.inf if value is None else value for value in values]
    return f"{statistics.median(known):.1f} ({min(known):.1f})"


if __name__ == "__main__":
    exit_with(main)
