"""Signal-to-noise of gradient reductions, on the gradients of a model in training.

python tools/measure_reduction.py --config configs/gpt_mini.yaml [section.key=value ...] \\
    [--early 20] [--late 400] [--output reduction.json] [--plot reduction.png] \\
    [--plot-blocks blocks.png]

Trains the config's model (preset o3) on one process. After --early and after --late steps it takes
the gradients of 64 micro-batches without training on them: 64 replicas. Each replica's gradients
are stored in E4M3, as training stores them, and the first N are reduced the way N processes would
reduce them. The reference is the mean of the gradients before they were stored. --plot-blocks draws
the reductions of all 64 by transformer block, as FP8-LM's Figure 7 does (arXiv 2310.18313).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8lm.arguments import file_to_write
from fp8lm.batch import Batch
from fp8lm.comm.groups import process_groups
from fp8lm.config import load_config
from fp8lm.data.files import write_aside
from fp8lm.gradient.fp8_sum import AutoScaler, ring_sum
from fp8lm.kernels import ReferenceKernels
from fp8lm.model import GPTModel
from fp8lm.numerics import E4M3
from fp8lm.pictures import picture_path, save_figure
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import CommandParser
from fp8lm.scaled_tensor import ScaledTensor
from fp8lm.training.build import Run, build
from fp8lm.training.evaluation import run_batches
from fp8lm.training.memory import linear_weights
from fp8lm.training.step import train_step, zero_gradients

REPLICAS = (2, 4, 8, 16, 32, 64)
NODE = 8
KERNELS = ReferenceKernels()

Gradients = dict[str, list[Tensor]]  # of every replica, fp32


def main(argv: list[str]) -> None:
    """Train, measure at both steps, print and write."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--early", type=int, default=20)
    parser.add_argument("--late", type=int, default=400)
    parser.add_argument("--output", type=file_to_write)
    parser.add_argument("--plot", type=picture_path)
    parser.add_argument("--plot-blocks", type=picture_path)
    options, overrides = parser.parse_known_args(argv)
    # Kept in fp32, so that what E4M3 does to them is known.
    overrides += ["precision.main_grads_dtype=fp32", "logging.dir=null"]
    config = load_config(options.config, overrides)
    device = torch.device("cpu")
    with process_groups(device) as groups:
        run = build(config, groups, device)
        results = measure_run(run, {"early": options.early, "late": options.late})
    print_table(results)
    if options.output:
        write_aside(options.output, json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)
    if options.plot_blocks:
        plot_blocks(results, options.plot_blocks)


def measure_run(run: Run, moments: dict[str, int]) -> dict[str, dict]:
    """Train `run` and measure after each of `moments` steps."""
    results, consumed = {}, 0
    batches = run_batches(run, run.train_dataset, 0)
    for step in range(1, max(moments.values()) + 1):
        microbatches = batches.next(run.batch_size.num_microbatches(consumed))
        rate = run.learning_rate.rate(step - 1, consumed)
        train_step(run.model, run.optimizer, run.training_objective, microbatches, rate)
        consumed = batches.consumed_samples
        for moment, at in moments.items():
            if at == step:
                gradients = replicas_of(run, batches.next(max(REPLICAS)))
                results[moment] = {"step": step, **measure(gradients)}
                batches = run_batches(run, run.train_dataset, consumed)
    return results


def replicas_of(run: Run, microbatches: list[Batch]) -> Gradients:
    """Gradients of the linear layers' matrices for every micro-batch alone."""
    gradients: Gradients = {name: [] for name in linear_weights(run.weights)}
    for batch in microbatches:
        for name, gradient in gradients_of(run, batch).items():
            gradients[name].append(gradient)
    return gradients


def gradients_of(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Gradients (fp32) of the linear layers' matrices for one micro-batch, by weight.

    Of a run on one process with `precision.main_grads_dtype=fp32`.
    """
    assert isinstance(run.model, GPTModel)  # one process has one stage
    zero_gradients(run.weights)
    run.objective.loss(run.model.forward_step(None, batch), batch).backward()
    return {
        name: run.weights[name].main_grad.value.payload.clone()
        for name in linear_weights(run.weights)
    }


def measure(gradients: Gradients) -> dict[str, dict]:
    """SNR in dB and shares of under- and overflow, by reduction.

    `replicas`: by their number; `blocks`: of all replicas, a list over transformer blocks.
    """
    stored = {
        name: [KERNELS.quantize(value, E4M3) for value in values]
        for name, values in gradients.items()
    }
    replicas: dict[int, dict[str, dict[str, float]]] = {}
    for size in REPLICAS:
        sums = {
            kind: {
                name: sums_of(values[:size], reduce(stored[name][:size]))
                for name, values in gradients.items()
            }
            for kind, reduce in REDUCTIONS.items()
        }
        replicas[size] = {kind: quality(own.values()) for kind, own in sums.items()}
    blocks = {kind: [quality(own) for own in by_block(of)] for kind, of in sums.items()}
    return {"replicas": replicas, "blocks": blocks}


@dataclass(frozen=True)
class Sums:
    """Of a tensor's elements: squares of means and errors, zeros and saturated ones, number."""

    signal: float
    noise: float
    zero: int
    saturated: int
    count: int


def sums_of(values: list[Tensor], reduced: Tensor) -> Sums:
    """`reduced` against the mean of `values`."""
    true = torch.stack(values).double().mean(0)
    largest = reduced.abs().max()
    return Sums(
        true.square().sum().item(),
        (reduced.double() - true).square().sum().item(),
        int(((reduced == 0) & (true != 0)).sum()),
        int(((reduced.abs() == largest) & (true.abs() > 1.0625 * largest)).sum()),
        true.numel(),
    )


def quality(of_tensors: Iterable[Sums]) -> dict[str, float]:
    """SNR over all tensors; of nonzero means, the share that became zero; that saturated."""
    signal, noise, zero, saturated, count = map(sum, zip(*map(astuple, of_tensors), strict=True))
    ratio = 10 * math.log10(signal / noise) if noise else math.inf
    return {"snr": ratio, "underflow": zero / count, "overflow": saturated / count}


def by_block(sums: Mapping[str, Sums]) -> list[list[Sums]]:
    """Those of each transformer block, in the order of the model."""
    blocks: dict[int, list[Sums]] = {}
    for name, own in sums.items():
        number = next(int(part) for part in name.split(".") if part.isdecimal())
        blocks.setdefault(number, []).append(own)
    return [blocks[number] for number in sorted(blocks)]


def fp32_accumulate(stored: list[ScaledTensor]) -> Tensor:
    """Every contribution in its own scale, summed in fp32."""
    return torch.stack([KERNELS.dequantize(tensor) for tensor in stored]).mean(0)


def hierarchical(stored: list[ScaledTensor]) -> Tensor:
    """As `fp32_accumulate`, the sums of nodes of eight cast once more."""
    if len(stored) <= NODE:
        return fp32_accumulate(stored)
    sums = [
        torch.stack([KERNELS.dequantize(t) for t in stored[start : start + NODE]]).sum(0)
        for start in range(0, len(stored), NODE)
    ]
    # The owner's own node does not cast what stays there.
    cast = [KERNELS.dequantize(KERNELS.quantize(value, E4M3)) for value in sums[1:]]
    return torch.stack([sums[0], *cast]).sum(0) / len(stored)


def fp8_ring(policy: str) -> Callable[[list[ScaledTensor]], Tensor]:
    """The ring that sums in FP8; automatic scaling from where its rule comes to rest."""

    def reduce(stored: list[ScaledTensor]) -> Tensor:
        size = len(stored)
        scaling = AutoScaler(["w"], size, policy, torch.device("cpu"))
        shared = torch.stack([tensor.scale for tensor in stored]).min()
        for _ in range(20):
            scale = shared * scaling.factors(["w"])[0]
            values = [KERNELS.dequantize(tensor) for tensor in stored]
            terms = [
                ScaledTensor(KERNELS.cast(value, scale, E4M3), scale, E4M3) for value in values
            ]
            total = ring_sum(terms, 0, KERNELS)
            before = scaling.mu.item()
            scaling.saturated.fill_(KERNELS.saturated_share(total))
            scaling.update(torch.tensor(False))
            if scaling.mu.item() >= before:
                break
        return KERNELS.dequantize(total) / size

    return reduce


def bf16_ring(stored: list[ScaledTensor]) -> Tensor:
    """A ring that sums in BF16."""
    total = KERNELS.dequantize(stored[0], torch.bfloat16)
    for tensor in stored[1:]:
        total = total + KERNELS.dequantize(tensor, torch.bfloat16)
    return total.float() / len(stored)


REDUCTIONS = {
    "fp32_accumulate": fp32_accumulate,
    "hierarchical": hierarchical,
    "BF16 ring": bf16_ring,
    "FP8 ring, automatic scaling": fp8_ring("automatic"),
    "FP8 ring, pre-scaling": fp8_ring("pre_scaling"),
    "FP8 ring, post-scaling": fp8_ring("post_scaling"),
}


def print_table(results: dict[str, dict]) -> None:
    """SNR in dB, a row per reduction."""
    for moment, result in results.items():
        print(f"{moment}: after {result['step']} steps, dB")
        print(f"{'replicas':30}" + "".join(f"{size:>8}" for size in REPLICAS))
        for kind in REDUCTIONS:
            cells = [f"{result['replicas'][size][kind]['snr']:8.1f}" for size in REPLICAS]
            print(f"{kind:30}" + "".join(cells))


def plot(results: dict[str, dict], path: Path) -> None:
    """SNR, underflow and overflow over the number of replicas."""

    def draw(axis: Any, result: dict, kind: str, key: str, marker: str) -> None:
        values = [result["replicas"][size][kind][key] for size in REPLICAS]
        axis.plot(REPLICAS, values, marker=marker, markersize=4, label=kind)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("replicas")

    _draw_all(results, path, draw)


def plot_blocks(results: dict[str, dict], path: Path) -> None:
    """The same over transformer blocks, of all replicas."""

    def draw(axis: Any, result: dict, kind: str, key: str, marker: str) -> None:
        values = [block[key] for block in result["blocks"][kind]]
        axis.plot(range(len(values)), values, marker=marker, markersize=4, label=kind)
        axis.set_xticks(range(len(values)))
        axis.set_xlabel(f"transformer block, {max(REPLICAS)} replicas")

    _draw_all(results, path, draw)


def _draw_all(results: dict[str, dict], path: Path, draw: Callable[..., None]) -> None:
    """A row per moment, a column per quality, a line per reduction."""
    from matplotlib.figure import Figure  # without a display, and half a second to import

    figure = Figure(figsize=(13, 4 * len(results)), layout="tight")
    axes = figure.subplots(len(results), 3, squeeze=False)
    titles = ("SNR (dB)", "underflow (share)", "overflow (share)")
    for row, (moment, result) in zip(axes, results.items(), strict=True):
        for axis, key, title in zip(row, ("snr", "underflow", "overflow"), titles, strict=True):
            for index, kind in enumerate(REDUCTIONS):
                draw(axis, result, kind, key, "os^Dvx"[index])
            axis.set_title(f"{title}, {moment} (step {result['step']})", fontsize=10)
            axis.grid(alpha=0.3)
    axes[0][2].legend(fontsize=8, loc="upper left")
    save_figure(figure, path, dpi=110)


if __name__ == "__main__":
    exit_with(main)
