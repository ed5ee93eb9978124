"""How far formats of Adam's second moment lead from the weights of AdamW in fp32.

python tools/measure_moments.py --config configs/quickstart.yaml --steps 120 [--seeds 1 2 3] \\
    [--json moments.json] [section.key=value ...]

Trains the config's model on one process with everything in fp32, and again with the second moment
of all weights stored in each format, nothing else changed. Of the matrices of linear layers:

    distance    |w - w_fp32| / |w_fp32 - w_start| after --steps steps
    loss        of the validation set

    fp16, fp8_e4m3 ...           `precision.exp_avg_sq_dtype`: as a run stores it
    root of E4M3, ...            fp8_e4m4_root with a bit less: rounded otherwise, or to nearest
    unsigned E5M3                the moment itself, stochastically
    companded (FlashOptim)       255 equal steps of the root, fp16 scale per 32 (arXiv 2602.23349)
    range expansion (COAT)       E4M3 of the power of v that fills its range, per 128 (2410.19313)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fp8lm.arguments import EachOnce, file_to_write, split_overrides
from fp8lm.comm.groups import ProcessGroups, process_groups
from fp8lm.config import load_config
from fp8lm.data.files import write_aside
from fp8lm.numerics import E4M3
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import CommandParser
from fp8lm.training.build import build
from fp8lm.training.evaluation import evaluate, run_batches
from fp8lm.training.memory import linear_weights
from fp8lm.training.step import train_step

CPU = torch.device("cpu")
FP32 = [
    "precision.preset=bf16",
    "precision.gemm=fp32",
    "precision.params_dtype=fp32",
    "logging.dir=null",
]

Store = Callable[[Tensor, torch.Generator], Tensor]


def on_grid(x: Tensor, mantissa: int, exponents: int, up: Tensor | float) -> Tensor:
    """`x` >= 0 on the grid of an unsigned format, up where `up` is below the share above the grid.

    Never 0. `up` may be a function's result in [0, 1): 0.5 rounds to nearest.
    """
    smallest = 2.0 ** (2 - 2 ** (exponents - 1) - mantissa)
    _, exponent = torch.frexp(x)
    step = torch.ldexp(torch.ones_like(x), exponent - 1 - mantissa).clamp(min=smallest)
    low = torch.floor(x / step) * step
    return torch.where(up < (x - low) / step, low + step, low).clamp(min=smallest)


def scaled(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Rows of `x` times the power of two that takes their maximum to `largest`, and that power."""
    amax = x.amax(dim=1, keepdim=True).clamp(min=1e-300)
    scale = torch.exp2(torch.floor(torch.log2(largest / amax)))
    return x * scale, scale


def of_root(mantissa: int, block: int | None, *, stochastic: bool) -> Store:
    """The root on a grid of `mantissa` bits, its exponent has the rest of eight."""
    exponents = 8 - mantissa if block else 4

    def store(v: Tensor, generator: torch.Generator) -> Tensor:
        root = v.sqrt().view(1 if block is None else v.numel() // block, -1)
        x, scale = scaled(root, 2.0 ** (2 ** (exponents - 1)) * (2 - 2.0**-mantissa))
        up = torch.rand(x.shape, generator=generator, dtype=x.dtype) if stochastic else 0.5
        return (on_grid(x, mantissa, exponents, up) / scale).square().view_as(v)

    return store


def unsigned_e5m3(v: Tensor, generator: torch.Generator) -> Tensor:
    """The second moment itself, with the exponent of FP16."""
    x, scale = scaled(v.view(1, -1), 2.0**15 * 1.875)
    up = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    return (on_grid(x, 3, 5, up) / scale).view_as(v)


def companded(v: Tensor, generator: torch.Generator) -> Tensor:
    """FlashOptim's: to nearest."""
    root = v.sqrt().view(-1, 32)
    scale = root.amax(dim=1, keepdim=True).half().double().clamp(min=2.0**-24)
    return ((root / scale * 255).round().clamp(max=255) / 255 * scale).square().view_as(v)


def expanded(v: Tensor, generator: torch.Generator) -> Tensor:
    """COAT's: v^k, k such that the range of a group is that of E4M3; to nearest."""
    groups = v.view(-1, 128).clamp(min=1e-30)
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    power = math.log(E4M3.max / E4M3.smallest_subnormal) / torch.log(high / low).clamp(min=1e-6)
    factor = E4M3.max / high**power
    codes = (groups**power * factor).float().clamp(max=E4M3.max).to(E4M3.dtype).double()
    return (codes / factor).pow(1 / power).view_as(v)


@dataclass(frozen=True)
class Scheme:
    """A format of the run's own, or a function that does to v what storing it would do."""

    exp_avg_sq_dtype: str = "fp32"
    store: Store | None = None
    bytes_per_parameter: float = 1.0


SCHEMES = {
    "fp16": Scheme("fp16", bytes_per_parameter=2),
    "fp8_e4m3": Scheme("fp8_e4m3"),
    "fp8_e5m2": Scheme("fp8_e5m2"),
    "fp8_e4m4_root": Scheme("fp8_e4m4_root"),
    "root of E4M3, stochastic": Scheme(store=of_root(3, None, stochastic=True)),
    "root of E4M3, to nearest": Scheme(store=of_root(3, None, stochastic=False)),
    "root of E4M4, to nearest": Scheme(store=of_root(4, None, stochastic=False)),
    "root of E3M5, stochastic, per 128": Scheme(
        store=of_root(5, 128, stochastic=True), bytes_per_parameter=1 + 4 / 128
    ),
    "unsigned E5M3, stochastic": Scheme(store=unsigned_e5m3),
    "companded (FlashOptim), per 32": Scheme(store=companded, bytes_per_parameter=1 + 2 / 32),
    "range expansion (COAT), per 128": Scheme(store=expanded, bytes_per_parameter=1 + 8 / 128),
}


@dataclass(frozen=True)
class Row:
    """What a scheme does, by seed; a loss that is no number is None."""

    scheme: str
    steps: int
    bytes_per_parameter: float
    distances: dict[int, float]
    losses: dict[int, float | None]


def main(argv: list[str]) -> None:
    """Train, compare, print and write."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=120, help="default: 120")
    parser.add_argument(
        "--seeds", type=int, nargs="+", action=EachOnce, default=[1], help="default: 1"
    )
    parser.add_argument("--only", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--json", type=file_to_write, help="where to write the rows")
    argv, overrides = split_overrides(argv)
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps is at least 1")
    rows = {
        name: Row(name, options.steps, SCHEMES[name].bytes_per_parameter, {}, {})
        for name in options.only
    }
    fp32 = {}
    with process_groups(CPU) as groups:
        for seed in options.seeds:
            arguments = (options.config, [*overrides, f"train.seed={seed}"], options.steps, groups)
            start, end, fp32[seed] = train(*arguments, Scheme())
            way = distance(end, start)
            for name, row in rows.items():
                _, found, loss = train(*arguments, SCHEMES[name])
                row.distances[seed] = distance(found, end) / way
                row.losses[seed] = loss if math.isfinite(loss) else None
    print(f"{'scheme':36}{'B/param':>8}  distance by seed, validation loss by seed; fp32: {fp32}")
    for row in rows.values():
        distances = " ".join(f"{value:.4f}" for value in row.distances.values())
        losses = " ".join(f"{value or math.nan:.4f}" for value in row.losses.values())
        print(f"{row.scheme:36}{row.bytes_per_parameter:8.2f}  {distances}   {losses}")
    if options.json:
        report = {"fp32_losses": fp32, "rows": [asdict(row) for row in rows.values()]}
        write_aside(options.json, json.dumps(report, indent=1) + "\n")


def train(
    config: str, overrides: list[str], steps: int, groups: ProcessGroups, scheme: Scheme
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """The matrices before and after, and the validation loss."""
    dtype = f"precision.exp_avg_sq_dtype={scheme.exp_avg_sq_dtype}"
    run = build(load_config(config, [*overrides, *FP32, dtype]), groups, CPU)
    names = linear_weights(run.weights)

    def weights() -> dict[str, Tensor]:
        return {name: run.weights[name].model_param.payload.clone() for name in names}

    start, generator = weights(), torch.Generator().manual_seed(0)
    batches, consumed = run_batches(run, run.train_dataset, 0), 0
    for step in tqdm(range(steps), unit="step", disable=None):
        microbatches = batches.next(run.batch_size.num_microbatches(consumed))
        rate = run.learning_rate.rate(step, consumed)
        train_step(run.model, run.optimizer, run.training_objective, microbatches, rate)
        consumed = batches.consumed_samples
        if scheme.store is not None:
            for state in run.optimizer.states.values():
                moment = state.exp_avg_sq.payload
                moment.copy_(scheme.store(moment.double(), generator))
    _, validation, _ = run.datasets
    loss = math.nan if validation is None else evaluate(run, validation).loss
    return start, weights(), loss


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of all tensors together."""
    squares = ((a[name].double() - b[name].double()).square().sum().item() for name in a)
    return math.sqrt(sum(squares))


if __name__ == "__main__":
    exit_with(main)
