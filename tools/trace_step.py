"""Predict a training step on a GPU from the operations that it runs, without a GPU.

python tools/trace_step.py --config configs/gpt_7b.yaml [--preset o3 ...] [section.key=value ...] \\
    [--hardware configs/hardware/h200.yaml] [--replicas 32] [--json step.json] [--output step.png]

Each preset (default: the config's), and bf16 to compare with, runs a whole optimizer step of two
micro-batches on the meta device, where tensors have shapes and no memory. Every operation counts as
one or more launches, and a launch takes as long as its bytes or its flops need on the hardware.
What is not in the prediction: gaps between launches, the time of collectives (their bytes are
counted), and the idle time of a pipeline, of which one stage with both ends is traced. Attention is
causal over whole samples, also where data.reset_attention_mask keeps their documents apart.

Two models are traced that differ by one layer: its cost is the difference, and the model's the sum.
With --replicas the reduction of gradients and the optimizer's shards are traced on all layers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fp8lm.arguments import as_path, file_to_write, number_type, split_overrides
from fp8lm.config import Config, load_config
from fp8lm.data.files import write_aside
from fp8lm.data.tokenizer import build_tokenizer
from fp8lm.pictures import picture_path, save_figure
from fp8lm.planner.tracing.costs import FIRST, FURTHER, ONCE, Cost, StepCost
from fp8lm.planner.tracing.floor import ideal_bytes, matrix_parameters
from fp8lm.planner.tracing.model import one_stage, trace_model
from fp8lm.planner.tracing.purposes import ATTENTION, GEMM, PURPOSES
from fp8lm.planner.tracing.roofline import MICRO, TERA, Hardware
from fp8lm.planner.tracing.run import KERNELS, trace_step
from fp8lm.runtime.errors import CommandParser, InputError, run_command

BF16 = "bf16"
H200 = Path(__file__).parents[1] / "configs/hardware/h200.yaml"
GIGA, MEGA, MS = 1e9, 1e6, 1e3


def main(argv: list[str]) -> None:
    """Trace all presets, print the tables, write the files."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", required=True)
    add("--preset", nargs="+", help="default: the config's; bf16 is always traced too")
    add("--hardware", type=as_path, default=H200, help="a file like those of configs/hardware")
    add("--kernels", choices=KERNELS, help="default: those that a Hopper GPU gets")
    add("--replicas", type=number_type(1), default=1, help="data-parallel ranks")
    add("--json", type=file_to_write, help="write the numbers to this file")
    add("--output", type=picture_path, help="draw the time of a layer by purpose, a PNG or other")
    argv, overrides = split_overrides(argv)
    options = parser.parse_args(argv)
    hardware = Hardware.read(options.hardware)
    configured = load_config(options.config, overrides)
    presets = options.preset or [configured.precision.preset]
    predictions = {
        preset: predict(
            options.config, overrides, preset, hardware, options.replicas, options.kernels
        )
        for preset in dict.fromkeys((BF16, *presets))
    }
    facts = {preset: as_facts(p, predictions[BF16]) for preset, p in predictions.items()}
    print(table(predictions, facts, hardware))
    if options.json:
        shown = {
            "config": options.config,
            "overrides": overrides,
            "replicas": options.replicas,
            "kernels": options.kernels,
            "hardware": {"file": options.hardware.name, **hardware.model_dump()},
            "presets": facts,
        }
        write_aside(options.json, json.dumps(shown, indent=1) + "\n")
    if options.output:
        plot(facts, f"{Path(options.config).stem}, {hardware.name}", options.output)


@dataclass(frozen=True)
class Prediction:
    """Costs under one preset: of a `layer`, of the `ends` around all layers, and of the `step`.

    `layer` and `ends` are of one replica. `layers` are those of a pipeline stage; `step` is of
    `microbatches` micro-batches, and `once` what it does once.
    """

    config: Config
    hardware: Hardware
    layer: StepCost
    ends: StepCost
    once: Cost
    layers: int
    microbatches: int

    @cached_property
    def step(self) -> Cost:
        """The whole step of a rank."""
        model = self.layer.times(self.layers) + self.ends
        return model.total(FIRST) + model.total(FURTHER).times(self.microbatches - 1) + self.once

    @property
    def launching_seconds(self) -> float:
        """What the host takes for the launches of a layer; a CUDA graph is one launch."""
        return self._launching(self.layer.total(FURTHER), self.config.train.enable_cuda_graph)

    @property
    def step_seconds_of_both(self) -> float:
        """The step, of which micro-batches and the rest each take what the slower one takes."""
        model = self.layer.times(self.layers) + self.ends
        first, further = model.total(FIRST), model.total(FURTHER)
        graphs = self.config.train.enable_cuda_graph
        return (
            self._seconds_of_both(first, graphs)
            + self._seconds_of_both(further, graphs) * (self.microbatches - 1)
            + self._seconds_of_both(self.once)
        )

    def _seconds_of_both(self, cost: Cost, graphed: bool = False) -> float:
        return max(cost.seconds, self._launching(cost, graphed))

    def _launching(self, cost: Cost, graphed: bool) -> float:
        return 0.0 if graphed else cost.launches * self.hardware.host_launch_us * MICRO

    @property
    def floor_seconds(self) -> float:
        """An ideally fused layer: its GEMMs and attention, and the bytes of `ideal_bytes`."""
        arithmetic = self.layer.total(FURTHER, lambda purpose: purpose in (GEMM, ATTENTION))
        bandwidth = self.hardware.memory_tb_per_s * TERA
        return arithmetic.seconds + ideal_bytes(self.config) / bandwidth


def predict(
    path: str,
    overrides: list[str],
    preset: str,
    hardware: Hardware,
    replicas: int,
    kernels: str | None = None,
) -> Prediction:
    """Trace the config at `path` with `overrides` under `preset`."""
    config = load_config(path, [*overrides, f"precision.preset={preset}"])
    parallel = config.parallel
    layers = config.model.num_layers // parallel.pipeline_model_parallel_size
    microbatches, left = divmod(
        config.train.global_batch_size, config.train.micro_batch_size * replicas
    )
    if replicas > 1 and config.precision.grad_reduce != "fp32_accumulate":
        raise InputError(
            f"--replicas {replicas}: only precision.grad_reduce = fp32_accumulate is traced, not "
            f"{config.precision.grad_reduce}: leave --replicas out"
        )
    if left or not microbatches:
        raise InputError(
            f"--replicas {replicas}: train.global_batch_size = {config.train.global_batch_size} is "
            f"not a multiple of as many micro-batches of {config.train.micro_batch_size}"
        )
    num_ids = build_tokenizer(config.tokenizer).vocab_size
    traced = trace_model(config, num_ids, hardware, kernels)
    layer, ends = traced.layer.cost, traced.ends.cost
    if replicas == 1:
        once = traced.of_layers(layers).cost.total(ONCE)
    else:  # ranks that are not there cannot be asked for the size of their machines
        shared = one_stage(config, layers, node_size=parallel.node_size or 8)
        world_size = parallel.tensor_model_parallel_size * replicas
        once = trace_step(shared, num_ids, hardware, world_size, kernels).cost.total(ONCE)
    return Prediction(config, hardware, layer, ends, once, layers, microbatches)


def as_facts(prediction: Prediction, bf16: Prediction) -> dict[str, Any]:
    """The numbers of a prediction, of a layer per further micro-batch where nothing else is said.

    Ratios are times of `bf16` over this one's: above 1 is faster.
    """
    layer, ends = prediction.layer.total(FURTHER), prediction.ends.total(FURTHER)
    purposes = _in_order(prediction.layer.by_purpose(FURTHER))
    optimizer = prediction.layer.total(ONCE)
    return {
        "launches_per_layer": round(layer.launches),
        "hbm_bytes_per_layer": {p: round(cost.moved) for p, cost in purposes.items()},
        "ms_per_layer": {p: MS * cost.seconds for p, cost in purposes.items()},
        "launches_by_purpose": {p: round(cost.launches) for p, cost in purposes.items()},
        "gemm_flops": round(purposes[GEMM].flops),
        "collectives_per_layer": round(layer.collectives),
        "wire_bytes_per_layer": round(layer.sent),
        "ends": {
            "launches": round(ends.launches),
            "hbm_bytes": {
                p: round(cost.moved)
                for p, cost in _in_order(prediction.ends.by_purpose(FURTHER)).items()
            },
        },
        "once": {
            "launches_per_layer": round(optimizer.launches),
            "hbm_bytes_per_parameter": optimizer.moved / matrix_parameters(prediction.config),
            "launches": round(prediction.once.launches),
            "hbm_bytes": round(prediction.once.moved),
            "wire_bytes": round(prediction.once.sent),
        },
        "layers": prediction.layers,
        "microbatches": prediction.microbatches,
        "predicted_ms": {
            "gemm": MS * purposes[GEMM].seconds,
            "layer": MS * layer.seconds,
            "ends": MS * ends.seconds,
            "once": MS * prediction.once.seconds,
            "step": MS * prediction.step.seconds,
        },
        "floor": {
            "hbm_bytes_per_layer": round(ideal_bytes(prediction.config)),
            "layer_ms": MS * prediction.floor_seconds,
            "ratio_to_bf16": bf16.floor_seconds / prediction.floor_seconds,
        },
        "host": {
            "layer_ms": MS * prediction.launching_seconds,
            "step_ms": MS * prediction.step_seconds_of_both,
            "ratio_to_bf16": bf16.step_seconds_of_both / prediction.step_seconds_of_both,
        },
        "ratio_to_bf16": bf16.step.seconds / prediction.step.seconds,
    }


def _in_order(costs: Mapping[str, Cost]) -> dict[str, Cost]:
    return {purpose: costs[purpose] for purpose in PURPOSES if purpose in costs}


def table(
    predictions: Mapping[str, Prediction], facts: Mapping[str, dict[str, Any]], hardware: Hardware
) -> str:
    """A column per preset: GB by purpose, launches, and predicted milliseconds."""
    config = predictions[BF16].config
    parallel, model = config.parallel, config.model
    head = (
        f"h {model.hidden_size}, ffn {model.ffn_hidden_size}, sequences of {model.seq_length}, "
        f"micro-batches of {config.train.micro_batch_size}, "
        f"TP {parallel.tensor_model_parallel_size}{' with SP' * parallel.sequence_parallel}; "
        f"predicted for {hardware.name}"
        f"{'; attention over whole samples' * config.separates_documents}"
    )
    rows = [("", list(facts))]

    def row(label: str, form: str, number: Any) -> None:
        rows.append((label, [form.format(number(of_preset)) for of_preset in facts.values()]))

    used = [p for p in PURPOSES if any(p in f["hbm_bytes_per_layer"] for f in facts.values())]
    for purpose in used:
        row(
            f"layer, GB: {purpose}",
            "{:.3f}",
            lambda f, p=purpose: f["hbm_bytes_per_layer"].get(p, 0) / GIGA,
        )
    row("layer, GB in all", "{:.3f}", lambda f: sum(f["hbm_bytes_per_layer"].values()) / GIGA)
    row("layer, launches", "{}", lambda f: f["launches_per_layer"])
    row("layer, collectives", "{}", lambda f: f["collectives_per_layer"])
    row("layer, MB sent", "{:.1f}", lambda f: f["wire_bytes_per_layer"] / MEGA)
    row("layer, ms of GEMMs", "{:.2f}", lambda f: f["predicted_ms"]["gemm"])
    row("layer, ms", "{:.2f}", lambda f: f["predicted_ms"]["layer"])
    row("layer, ms if ideally fused", "{:.2f}", lambda f: f["floor"]["layer_ms"])
    row("ends, ms", "{:.2f}", lambda f: f["predicted_ms"]["ends"])
    row("once, bytes per parameter", "{:.0f}", lambda f: f["once"]["hbm_bytes_per_parameter"])
    row("once, launches per layer", "{}", lambda f: f["once"]["launches_per_layer"])
    row("once, ms", "{:.1f}", lambda f: f["predicted_ms"]["once"])
    row("layers", "{}", lambda f: f["layers"])
    row("micro-batches", "{}", lambda f: f["microbatches"])
    row("step, ms", "{:.0f}", lambda f: f["predicted_ms"]["step"])
    row("speed to bf16", "{:.2f}", lambda f: f["ratio_to_bf16"])
    row("layer, ms of launches on the host", "{:.2f}", lambda f: f["host"]["layer_ms"])
    row("step, ms, the host's included", "{:.0f}", lambda f: f["host"]["step_ms"])
    row("speed to bf16, the host's included", "{:.2f}", lambda f: f["host"]["ratio_to_bf16"])
    row("speed to bf16, ideally fused layers", "{:.2f}", lambda f: f["floor"]["ratio_to_bf16"])
    lines = [f"{label:38}" + "".join(f"{cell:>12}" for cell in cells) for label, cells in rows]
    return "\n".join((head, *lines))


def plot(facts: Mapping[str, dict[str, Any]], title: str, path: Path) -> None:
    """The predicted time of a layer by purpose, a bar per preset, and the ideally fused layer's."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without a display, and half a second to import

    figure = Figure(figsize=(9, 1.2 + 0.8 * len(facts)), layout="tight")
    axes = figure.subplots()
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    names = list(facts)
    left = [0.0] * len(names)
    for number, purpose in enumerate(PURPOSES):
        width = [facts[name]["ms_per_layer"].get(purpose, 0.0) for name in names]
        if any(width):
            color = colors[number % len(colors)]
            axes.barh(names, width, left=left, color=color, label=purpose)
            left = [start + more for start, more in zip(left, width, strict=True)]
    for place, name in enumerate(names):
        floor = facts[name]["floor"]["layer_ms"]
        label = "ideally fused" if place == 0 else None
        axes.plot([floor, floor], [place - 0.45, place + 0.45], "k--", lw=1.2, label=label)
    axes.invert_yaxis()
    axes.set_xlabel("predicted ms per layer and micro-batch")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, path, dpi=110)


if __name__ == "__main__":
    sys.exit(run_command(main))
