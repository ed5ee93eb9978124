"""The failure of SwiGLU in FP8, provoked on a small model: which recipes survive aligned weights.

python tools/provoke_swiglu.py --config configs/quickstart.yaml model.swiglu=true \\
    model.untie_embeddings_and_output_weights=true [--recipes bf16 te te_delayed ...] \\
    [--seeds 1 2 3] [--strength 400] [--json rows.json] [--plot picture.png] [section.key=value ...]

In long trainings the gate and up rows of some channels of SwiGLU align and grow, so that a channel
answers a token that comes now and then with a value far beyond all others (Fishman et al., arXiv
2409.12517). A scale taken from the amaxes of earlier steps knows nothing of it: the value
saturates, and from the next step on all others have a scale that is made for it.

Here such a channel is planted in every layer before the first step. With e the direction of the
initial embedding of a rare token t, x the normalized input of the MLP, and s the --strength,

    gate = up = s (e . x - 4.5)      y = silu(gate) up:  about (s (sqrt(h) - 4.5))^2 for t,
                                                         0 below 4.5 standard deviations

t is the token that is in most steps, but in none of the first tenth of the run, and in at most a
tenth of all. --strength 0 plants nothing.

A recipe is as for tools/compare_recipes.py: a preset, or NAME=key=value[,key=value ...]. Seeds
choose initial weights and noise, the order of the data is the same. Per recipe, over seeds: the
validation loss and its gap to the first recipe with the 95 % interval of its mean, and of what
the second matrices of the MLPs read the share that saturated in the first step with t and the
share that became zero in those after it.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from compare_recipes import read_recipes, refuse_own_keys
from compare_runs import half_width

from fp8lm.arguments import EachOnce, file_to_write, path_text, split_overrides
from fp8lm.comm.groups import ProcessGroups, process_groups
from fp8lm.config import Config, load_config
from fp8lm.data.files import write_aside
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.quantizer import quantizers_of
from fp8lm.model.init import initial_value
from fp8lm.pictures import picture_path, save_figure
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import CommandParser, InputError
from fp8lm.scaled_tensor import ScaledTensor
from fp8lm.telemetry.statistics import SUMS, measure
from fp8lm.training.build import Run, build
from fp8lm.training.evaluation import evaluate, run_batches
from fp8lm.training.step import train_step

CPU = torch.device("cpu")
KERNELS = ReferenceKernels()
THRESHOLD = 4.5  # standard deviations of a normalized input, which few tokens reach by chance
EMBEDDING = "embedding.word_embeddings.weight"
DELAYED = "te_delayed"
RECIPES = (
    *("bf16", "te", DELAYED),
    f"{DELAYED}_16=preset={DELAYED},fp8_amax_history_len=16",
    f"{DELAYED}_smooth=preset={DELAYED},smooth_swiglu=true",
    *("unit", "deepseek", "mxfp8", "coat", "o3"),
    "o3_smooth=preset=o3,smooth_swiglu=true",
    "o4",
)


@dataclass(frozen=True)
class Row:
    """One training; lists are by step. A loss that is no number is None.

    `amaxes`, `saturated` (share) and `underflow` (share) are of the inputs of the second matrices
    of all MLPs as they are cast.
    """

    recipe: str
    seed: int
    strength: float
    token: int
    steps_with_token: list[int]
    validation_loss: float | None
    losses: list[float | None]
    amaxes: list[float | None]
    saturated: list[float]
    underflow: list[float]

    @property
    def lost(self) -> float:
        """The mean of `underflow` after the first step with the token."""
        return statistics.fmean(self.underflow[self.steps_with_token[0] + 1 :])


class CastCounter:
    """Adds up what the casts of a step do to the tensors that it observes."""

    def __init__(self) -> None:
        self.sums, self.amax = torch.zeros(len(SUMS), dtype=torch.float64), torch.zeros(())

    def __call__(self, x: Tensor, quantized: ScaledTensor) -> None:
        """See `Observer`."""
        sums, maxima = measure(x, quantized, KERNELS)
        self.sums += sums
        self.amax = torch.maximum(self.amax, maxima[0])

    def take(self) -> tuple[float, float, float]:
        """Amax, share saturated and share that became zero; starts anew."""
        sums, amax = dict(zip(SUMS, self.sums.tolist(), strict=True)), self.amax.item()
        self.sums.zero_()
        self.amax = torch.zeros(())
        return amax, sums["saturated"] / sums["count"], sums["underflows"] / sums["count"]


def main(argv: list[str]) -> None:
    """Train every recipe from every seed, print, write and draw."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--recipes", type=path_text, nargs="+", default=RECIPES, metavar="RECIPE")
    parser.add_argument(
        "--seeds", type=int, nargs="+", action=EachOnce, default=[1], help="default: 1"
    )
    parser.add_argument(
        "--strength", type=float, default=400.0, help="length of the rows; default: 400"
    )
    parser.add_argument("--json", type=file_to_write, help="where to write a row per training")
    parser.add_argument("--plot", type=picture_path, help="PNG or other picture to write")
    argv, overrides = split_overrides(argv)
    options = parser.parse_args(argv)
    if not 0 <= options.strength < math.inf:
        parser.error("--strength is 0 or more")
    refuse_own_keys(overrides, "provoke_swiglu.py")
    overrides += ["logging.dir=null", "data.shuffle_seed=1"]
    check(load_config(options.config, overrides))
    recipes = read_recipes(options.recipes)
    configs = [
        (name, load_config(options.config, [*overrides, *keys, f"train.seed={seed}"]))
        for name, keys in recipes.items()
        for seed in options.seeds
    ]
    rows: list[Row] = []
    with process_groups(CPU) as groups:
        for name, config in tqdm(configs, unit="run", disable=None):
            rows.append(train(name, config, groups, options.strength))
            if options.json:  # what is there outlives an interruption
                lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
                write_aside(options.json, f"[\n{lines}\n]\n")
    print_table(rows)
    if options.plot:
        plot(rows, options.plot)


def check(config: Config) -> None:
    """InputError for a model that cannot hold the channel, or a run without a number of steps."""
    num_steps(config)
    if not config.model.swiglu:
        raise InputError("this is about SwiGLU: add model.swiglu=true")
    if not config.model.untie_embeddings_and_output_weights:
        key = "model.untie_embeddings_and_output_weights=true"
        raise InputError(f"an output head would move the rare token's embedding: add {key}")
    if config.model.disable_bias_linear:
        raise InputError("the channel needs a bias: drop model.disable_bias_linear=true")


def num_steps(config: Config) -> int:
    """`train.train_iters`; InputError without."""
    if config.train.train_iters is None:
        raise InputError("the length of the run is in steps here: add train.train_iters=200")
    return config.train.train_iters


def train(recipe: str, config: Config, groups: ProcessGroups, strength: float) -> Row:
    """Plant the channel and train to the end of the config's run, on one process."""
    run, counter = build(config, groups, CPU), CastCounter()
    for (layer, kind), quantizer in quantizers_of(run.model).items():
        if layer.endswith("linear_fc2") and kind == "input":
            quantizer.observer = counter
    token, steps_with_token = rare_token(run)
    plant(run, token, strength)
    losses, casts = [], []
    batches, consumed = run_batches(run, run.train_dataset, 0), 0
    for step in range(num_steps(config)):
        microbatches = batches.next(run.batch_size.num_microbatches(consumed))
        result = train_step(
            run.model,
            run.optimizer,
            run.training_objective,
            microbatches,
            run.learning_rate.rate(step, consumed),
            histories=run.histories,
        )
        consumed = batches.consumed_samples
        losses.append(_rounded(result.loss.item()))
        casts.append([_rounded(value) for value in counter.take()])
    _, validation, _ = run.datasets
    loss = math.nan if validation is None else evaluate(run, validation).loss
    amaxes, saturated, underflow = (list(column) for column in zip(*casts, strict=True))
    return Row(
        recipe,
        config.train.seed,
        strength,
        token,
        steps_with_token,
        loss if math.isfinite(loss) else None,
        losses,
        amaxes,
        saturated,
        underflow,
    )


def rare_token(run: Run) -> tuple[int, list[int]]:
    """The token of the module's text and the steps of the run that have it; InputError if none."""
    steps = num_steps(run.config)
    batches, consumed = run_batches(run, run.train_dataset, 0), 0
    seen: dict[int, list[int]] = {}
    for step in range(steps):
        microbatches = batches.next(run.batch_size.num_microbatches(consumed))
        consumed = batches.consumed_samples
        for token in torch.cat([batch.tokens.flatten() for batch in microbatches]).unique():
            seen.setdefault(int(token), []).append(step)
    rare = {
        token: len(found)
        for token, found in seen.items()
        if len(found) <= steps / 10 and steps / 10 <= found[0] < steps - 1
    }
    if not rare:
        raise InputError("no token is rare in this run's data: train on text, or for longer")
    token, _ = Counter(rare).most_common(1)[0]
    return token, seen[token]


def plant(run: Run, token: int, strength: float) -> None:
    """Make channel 0 of every MLP answer `token`, before the first step."""
    if not strength:
        return
    values: Callable[[str], Tensor] = partial(_initial, run)
    row = values(EMBEDDING)[token]
    direction = (row - row.mean()) / (row - row.mean()).norm()
    for name in run.weights:
        if not name.endswith("linear_fc1.weight"):
            continue
        bias_name = name.removesuffix("weight") + "bias"
        weight, bias = values(name), values(bias_name)
        gate_and_up = [0, weight.shape[0] // 2]
        weight[gate_and_up] = strength * direction
        bias[gate_and_up] = -strength * THRESHOLD
        run.optimizer.initialize(name, weight)
        run.optimizer.initialize(bias_name, bias)


def _initial(run: Run, name: str) -> Tensor:
    return initial_value(name, run.weights[name].spec, run.config.train.seed)


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def by_recipe(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of every recipe, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.recipe, []).append(row)
    return found


def print_table(rows: list[Row]) -> None:
    """A line per recipe."""
    recipes = by_recipe(rows)
    base = [_number(row.validation_loss) for row in next(iter(recipes.values()))]
    width = max(map(len, recipes)) + 2
    steps = sorted({step for row in rows for step in row.steps_with_token})
    print(f"token {rows[0].token} in steps {', '.join(map(str, steps))}")
    print(f"{'recipe':{width}}{'loss':>9}{'gap %':>18}{'amax':>10}{'saturated':>11}{'zero':>9}")
    for name, own in recipes.items():
        losses = [_number(row.validation_loss) for row in own]
        gaps = [100 * (loss / other - 1) for loss, other in zip(losses, base, strict=True)]
        interval = half_width(gaps)
        gap = f"{statistics.fmean(gaps):+.2f}" + ("" if interval is None else f" +- {interval:.2f}")
        amax = max(_number(value) for row in own for value in row.amaxes)
        saturated = statistics.fmean(row.saturated[row.steps_with_token[0]] for row in own)
        lost = statistics.fmean(row.lost for row in own)
        figures = f"{amax:10.3g}{100 * saturated:10.5f}%{100 * lost:8.2f}%"
        print(f"{name:{width}}{statistics.fmean(losses):9.4f}{gap:>18}{figures}")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def plot(rows: list[Row], path: Path) -> None:
    """By step: training losses above the first recipe's, and what became zero.

    Means over seeds; thin lines are seeds.
    """
    from matplotlib.figure import Figure  # without a display, and half a second to import

    recipes = by_recipe(rows)
    base, *_ = recipes
    figure = Figure(figsize=(14, 5.5), layout="tight")
    left, right = figure.subplots(1, 2)
    for index, (name, own) in enumerate(recipes.items()):
        style = {"color": f"C{index % 10}", "linestyle": ("-", "--")[index // 10]}
        gaps = [_gap(row, other) for row, other in zip(own, recipes[base], strict=True)]
        for gap in gaps:
            left.plot(gap, linewidth=0.6, alpha=0.35, **style)
        left.plot([statistics.fmean(at) for at in zip(*gaps, strict=True)], label=name, **style)
        underflow = [statistics.fmean(at) for at in zip(*(r.underflow for r in own), strict=True)]
        right.plot(underflow, **style)
    for axis in (left, right):
        for step in rows[0].steps_with_token:
            axis.axvline(step, color="0.85", linewidth=0.8, zorder=0)
        axis.set_xlabel("step (grey: those with the rare token)")
        axis.grid(alpha=0.2)
    left.set_ylabel(f"training loss above {base}, mean of ten steps")
    right.set_ylabel("share of the second matrices' inputs that becomes zero")
    left.legend(fontsize=8, loc="upper left")
    save_figure(figure, path, dpi=110)


def _gap(row: Row, base: Row, length: int = 10) -> list[float]:
    """The loss above that of `base`, means of the last `length` steps."""
    pairs = zip(row.losses, base.losses, strict=True)
    gaps = [_number(loss) - _number(other) for loss, other in pairs]
    return [statistics.fmean(gaps[max(0, end - length) : end]) for end in range(1, len(gaps) + 1)]


if __name__ == "__main__":
    exit_with(main)
