"""How much of a gradient survives its accumulation, by scheme, on a model in training.

python tools/measure_accumulation.py --config configs/quickstart.yaml --micro-batches 128 \\
    [--after 0] [--outlier 1] [--json accumulation.json] [section.key=value ...]

Trains the config's model on one process for --after steps, then takes the gradients of the linear
layers' matrices for --micro-batches micro-batches, without training on them, and adds them up with
every scheme. The reference is their sum in fp64. Of all matrices together:

    projection    <sum, true> / <true, true>: the share of the gradient that is kept, 1 if unbiased
    SNR           |true|^2 / |sum - true|^2 in dB

and, since these weigh by energy, what elements and channels see:

    zeroed        share of the elements that are 0 in the sum and not in the true one
    column SNR    of each column, an input channel: the median of all columns, and the worst

With --outlier F every 128th input channel is F times as large, as some are in large models: its
column of every micro-batch's gradient is multiplied by F.

    fp8_e4m3 ...             `precision.main_grads_dtype`, each addition rounded to nearest
    fp8_e4m3, stochastic     the same, rounded stochastically
    fp8_e4m3, wgrad of k     one weight gradient of k micro-batches, whose operands are kept
    fp8_e4m3, reduced per k  every k micro-batches into fp32 shards, here of eight replicas
    E2M5 in R x C ...        a scale, any number, for R rows and C columns (fp8_e2m5: 1 x 128)
    E2M5, even columns       fp8_e2m5 of columns times the powers of two that make the amaxes of
                             the first micro-batch's columns even
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from measure_reduction import gradients_of

from fp8lm.arguments import file_to_write
from fp8lm.batch import Batch
from fp8lm.comm.groups import process_groups
from fp8lm.config import load_config
from fp8lm.data.files import write_aside
from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.rounding import cast_stochastic
from fp8lm.layers.main_grad import MainGrad
from fp8lm.numerics import BF16, E2M5, E4M3, Format, Granularity, scale_from_amax
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import CommandParser
from fp8lm.scaled_tensor import ScaledTensor
from fp8lm.training.build import Run, build
from fp8lm.training.evaluation import run_batches
from fp8lm.training.memory import linear_weights
from fp8lm.training.step import train_step

KERNELS = ReferenceKernels()
REPLICAS = 8  # over which fp32 shards are divided
CHANNELS_PER_OUTLIER = 128


class Sum:
    """A sum in a main gradient of `fmt`; `every` terms are added in fp32 before they go in."""

    def __init__(self, shape: tuple[int, ...], fmt: Format, every: int = 1) -> None:
        self.grad, self.every = MainGrad(shape, fmt, KERNELS, torch.device("cpu")), every
        self.waiting: list[Tensor] = []

    def add(self, dw: Tensor) -> None:
        """Add one micro-batch's gradient."""
        self.waiting.append(dw)
        if len(self.waiting) == self.every:
            self.grad.add(torch.stack(self.waiting).sum(0))
            self.waiting = []

    def value(self) -> Tensor:
        """The sum of all that was added."""
        return KERNELS.dequantize(self.grad.value) + sum(self.waiting)


@dataclass(frozen=True)
class Grid:
    """The numbers of an eight-bit format that torch has no dtype of, all codes finite."""

    max: float
    smallest_normal: float
    mantissa_bits: int

    def round(self, x: Tensor) -> Tensor:
        """`x` (fp32) to nearest, ties to even, saturated."""
        exponent = torch.frexp(x)[1] - 1
        lowest = math.frexp(self.smallest_normal)[1] - 1
        ones = torch.ones_like(x)
        step = torch.ldexp(ones, exponent.clamp(min=lowest) - self.mantissa_bits)
        return (x / step).round_().mul_(step).clamp_(-self.max, self.max)


GRID_E2M5 = Grid(E2M5.max, E2M5.smallest_normal, E2M5.mantissa_bits)
GRID_E3M4 = Grid(31.0, 2.0**-2, 4)


class BlockSum:
    """A sum in `grid`, with a scale for each of the blocks of `granularity`.

    The scale is the quotient of the grid's largest number and the block's amax, as that of E2M5.
    `even_columns`: see the module.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        grid: Grid,
        granularity: Granularity,
        *,
        even_columns: bool = False,
    ) -> None:
        self.sum, self.grid, self.granularity = torch.zeros(shape), grid, granularity
        self.even_columns, self.factors = even_columns, torch.ones(())

    def add(self, dw: Tensor) -> None:
        """Add one micro-batch's gradient."""
        if self.even_columns and not self.factors.ndim:
            self.factors = scale_from_amax(dw.abs().amax(dim=0).float(), E4M3)
        total = self.sum + dw * self.factors
        amax = self.granularity.max(total.abs())
        scale = torch.where(amax == 0, 1.0, torch.div(self.grid.max, amax))
        scales = self.granularity.expand(scale, total.shape)
        self.sum = self.grid.round(total * scales) / scales

    def value(self) -> Tensor:
        """The sum of all that was added."""
        return self.sum / self.factors


class StochasticSum:
    """A sum in E4M3 that is rounded stochastically."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.sum = ScaledTensor.zeros(shape, E4M3, torch.device("cpu"))
        self.generator = torch.Generator().manual_seed(0)

    def add(self, dw: Tensor) -> None:
        """Add one micro-batch's gradient."""
        total = self.value() + dw
        scale = scale_from_amax(KERNELS.amax(total), E4M3)
        low, high = -(1 << 31), (1 << 31) - 1
        noise = torch.randint(low, high, dw.shape, dtype=torch.int32, generator=self.generator)
        self.sum = ScaledTensor(cast_stochastic(total, scale, E4M3, noise), scale, E4M3)

    def value(self) -> Tensor:
        """The sum of all that was added."""
        return KERNELS.dequantize(self.sum)


class ShardedSum:
    """Sums of `every` terms in E4M3, which go into an fp32 sum: the owner's shard."""

    def __init__(self, shape: tuple[int, ...], every: int) -> None:
        self.grad = MainGrad(shape, E4M3, KERNELS, torch.device("cpu"))
        self.shard, self.every, self.count = torch.zeros(shape), every, 0

    def add(self, dw: Tensor) -> None:
        """Add one micro-batch's gradient."""
        self.grad.add(dw)
        self.count += 1
        if self.count % self.every == 0:
            self.shard += KERNELS.dequantize(self.grad.value)
            self.grad.zero()

    def value(self) -> Tensor:
        """The sum of all that was added."""
        rest = self.count % self.every
        return self.shard + (KERNELS.dequantize(self.grad.value) if rest else 0.0)


@dataclass(frozen=True)
class Scheme:
    """A way to add gradients up: `start(shape)` has `add` and `value`."""

    start: Callable[[tuple[int, ...]], Sum | StochasticSum | ShardedSum | BlockSum]
    bytes_per_parameter: float


def _format(fmt: Format, every: int = 1) -> Callable[[tuple[int, ...]], Sum]:
    return lambda shape: Sum(shape, fmt, every)


def _sharded(every: int) -> Scheme:
    return Scheme(lambda shape: ShardedSum(shape, every), 1 + 4 / REPLICAS)


def _blocks(grid: Grid, rows: int, columns: int, *, even_columns: bool = False) -> Scheme:
    granularity = Granularity(rows, columns)
    return Scheme(
        lambda shape: BlockSum(shape, grid, granularity, even_columns=even_columns),
        1 + 4 / (rows * columns),
    )


SCHEMES = {
    "fp8_e4m3": Scheme(_format(E4M3), 1),
    "fp8_e2m5": Scheme(_format(E2M5), 1 + 4 / 128),
    "bf16": Scheme(_format(BF16), 2),
    "fp8_e4m3, stochastic": Scheme(StochasticSum, 1),
    "fp8_e4m3, wgrad of 4": Scheme(_format(E4M3, 4), 1),
    "fp8_e4m3, wgrad of 16": Scheme(_format(E4M3, 16), 1),
    "fp8_e4m3, reduced per 8": _sharded(8),
    "fp8_e4m3, reduced per 16": _sharded(16),
    "E2M5 in 1 x 32": _blocks(GRID_E2M5, 1, 32),
    "E2M5 in 16 x 8": _blocks(GRID_E2M5, 16, 8),
    "E2M5 in 128 x 1": _blocks(GRID_E2M5, 128, 1),
    "E3M4 in 1 x 128": _blocks(GRID_E3M4, 1, 128),
    "E3M4 in 16 x 8": _blocks(GRID_E3M4, 16, 8),
    "E2M5, even columns": _blocks(GRID_E2M5, 1, 128, even_columns=True),
}


@dataclass(frozen=True)
class Quality:
    """See the module; a signal to noise in dB is None without noise."""

    projection: float
    snr_db: float | None
    zeroed: float
    median_column_snr_db: float | None
    worst_column_snr_db: float | None


@dataclass(frozen=True)
class Row:
    """What a scheme keeps of the sum of `micro_batches`.

    `used_by`: configs that accumulate so, and their micro-batches. `fewer`: the same after powers
    of two of them.
    """

    scheme: str
    micro_batches: int
    after_steps: int
    projection: float
    snr_db: float | None
    zeroed: float
    median_column_snr_db: float | None
    worst_column_snr_db: float | None
    outlier: float
    bytes_per_parameter: float
    used_by: dict[str, int]
    fewer: dict[int, Quality]


def main(argv: list[str]) -> None:
    """Train, measure, print and write."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--micro-batches", type=int, default=128, help="default: 128")
    parser.add_argument("--after", type=int, default=0, help="steps of training first")
    parser.add_argument(
        "--outlier", type=float, default=1.0, help="factor of every 128th input channel; default: 1"
    )
    parser.add_argument("--json", type=file_to_write, help="where to write the rows")
    options, overrides = parser.parse_known_args(argv)
    if options.micro_batches < 1 or options.after < 0:
        parser.error("--micro-batches is at least 1, --after at least 0")
    if not 0 < options.outlier < math.inf:
        parser.error("--outlier is a positive number")
    # Kept in fp32, so that what a scheme does to them is known.
    overrides += ["precision.main_grads_dtype=fp32", "logging.dir=null"]
    config = load_config(options.config, overrides)
    device = torch.device("cpu")
    with process_groups(device) as groups:
        run = build(config, groups, device)
        measured = measure(run, options.after, options.micro_batches, options.outlier)
    used_by = configs_by_scheme()
    rows = [
        Row(
            name,
            options.micro_batches,
            options.after,
            **asdict(measured[name][options.micro_batches]),
            outlier=options.outlier,
            bytes_per_parameter=scheme.bytes_per_parameter,
            used_by=used_by.get(name, {}),
            fewer=measured[name],
        )
        for name, scheme in SCHEMES.items()
    ]
    print_table(rows)
    if options.json:
        write_aside(options.json, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def measure(
    run: Run, steps: int, count: int, outlier: float = 1.0
) -> dict[str, dict[int, Quality]]:
    """By scheme, what is kept of `count` micro-batches after `steps` steps, and of fewer."""
    batches = train_first(run, steps, count)
    shapes = {name: run.weights[name].spec.local_shape for name in linear_weights(run.weights)}
    sums = {
        scheme: {name: made.start(shape) for name, shape in shapes.items()}
        for scheme, made in SCHEMES.items()
    }
    true = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    found: dict[str, dict[int, Quality]] = {scheme: {} for scheme in SCHEMES}
    progress = tqdm(batches, unit="micro-batch", disable=None)
    for number, batch in enumerate(progress, start=1):
        for name, dw in gradients_of(run, batch).items():
            dw[:, ::CHANNELS_PER_OUTLIER] *= outlier
            true[name] += dw
            for of_scheme in sums.values():
                of_scheme[name].add(dw)
        if number == count or number & (number - 1) == 0:
            for scheme, of_scheme in sums.items():
                values = {name: own.value() for name, own in of_scheme.items()}
                found[scheme][number] = quality(true, values)
    return found


def train_first(run: Run, steps: int, count: int) -> list[Batch]:
    """Train for `steps` steps; the `count` micro-batches that come next."""
    batches, consumed = run_batches(run, run.train_dataset, 0), 0
    for step in range(steps):
        microbatches = batches.next(run.batch_size.num_microbatches(consumed))
        rate = run.learning_rate.rate(step, consumed)
        train_step(run.model, run.optimizer, run.training_objective, microbatches, rate)
        consumed = batches.consumed_samples
    return batches.next(count)


def quality(true: dict[str, Tensor], found: dict[str, Tensor]) -> Quality:
    """Of all sums together."""
    kept, zeroed, count = 0.0, 0, 0
    signals, noises = [], []  # of columns
    for name, exact in true.items():
        value = found[name].double()
        kept += (exact * value).sum().item()
        zeroed += int(((value == 0) & (exact != 0)).sum())
        count += exact.numel()
        signals.append(exact.square().sum(0))
        noises.append((value - exact).square().sum(0))
    signal, noise = torch.cat(signals), torch.cat(noises)
    columns = (signal / noise)[signal > 0]
    return Quality(
        projection=kept / signal.sum().item(),
        snr_db=_decibel(signal.sum() / noise.sum()),
        zeroed=zeroed / count,
        median_column_snr_db=_decibel(columns.median()),
        worst_column_snr_db=_decibel(columns.min()),
    )


def _decibel(ratio: Tensor) -> float | None:
    """None for infinity."""
    value = ratio.item()
    return 10 * math.log10(value) if math.isfinite(value) else None


def microbatches_of(path: Path) -> int | None:
    """Micro-batches a step of a replica, as the config's opening comment says; None without."""
    found = re.search(r"^# batch: .* x (\d+) micro-batch", path.read_text(), re.MULTILINE)
    return int(found[1]) if found else None


def configs_by_scheme() -> dict[str, dict[str, int]]:
    """Of every `precision.main_grads_dtype` the configs with it, and their micro-batches a step."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml")):
        if (count := microbatches_of(path)) is not None:
            dtype = load_config(path).precision.main_grads_dtype
            found.setdefault(dtype, {})[path.stem] = count
    return found


def print_table(rows: list[Row]) -> None:
    """A line per scheme."""
    first = rows[0]
    print(
        f"{first.micro_batches} micro-batches after {first.after_steps} steps, "
        f"every {CHANNELS_PER_OUTLIER}th channel times {first.outlier:g}"
    )
    titles = f"{'projection':>11}{'SNR dB':>8}{'columns':>9}{'worst':>7}{'zeroed':>9}{'B/param':>9}"
    print(f"{'scheme':26}{titles}  used by")
    for row in rows:
        users = ", ".join(f"{name} ({count})" for name, count in row.used_by.items())
        columns = f"{_text(row.median_column_snr_db):>9}{_text(row.worst_column_snr_db):>7}"
        print(
            f"{row.scheme:26}{row.projection:11.4f}{_text(row.snr_db):>8}{columns}"
            f"{100 * row.zeroed:8.3f}%{row.bytes_per_parameter:9.2f}  {users}"
        )


def _text(decibel: float | None) -> str:
    return "inf" if decibel is None else f"{decibel:.1f}"


if __name__ == "__main__":
    exit_with(main)
