"""Time of a step: the kernels of a traced step, the wires, and the wait for other stages.

    micro-batch    layers and ends by roofline + messages that nothing hides
    step           m micro-batches of the slowest stage / (1 - bubble)
                   + optimizer + what is left of reducing gradients and gathering parameters

Kernels follow each other without gaps. Of a layer's collectives the gathers of inputs for wgrad
run beside dgrad, and the sums of input gradients beside wgrad: a third of the gathers, half of the
sums. The reference model of preference training takes as long as the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fp8lm.model.decoder import StageSpec
from fp8lm.planner.batches import Batches
from fp8lm.planner.comm import (
    TP_WIRES,
    gathered_gradient_bytes,
    gradient_bytes,
    parameter_bytes,
    pipeline_message,
    tensor_parallel_bytes,
)
from fp8lm.planner.layout import Layout
from fp8lm.planner.tracing.costs import FIRST, FURTHER, ONCE
from fp8lm.planner.tracing.model import TracedModel
from fp8lm.planner.tracing.purposes import EMBEDDING
from fp8lm.planner.tracing.roofline import GIGA, TERA, Hardware

# Backward takes about twice as long as forward.
BACKWARD_SHARE = 2 / 3
EXPOSED = {"tp_gather": 2 / 3, "tp_reduce": 1 / 2}


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part; `bubble` is the wait for other stages."""

    kernels: float
    tensor_parallel: float
    pipeline: float
    bubble: float
    optimizer: float
    data_parallel: float
    reference: float = 0.0

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(vars(self).values())


def step_time(
    layout: Layout, batches: Batches, traced: TracedModel, hardware: Hardware
) -> StepTime:
    """The time of a step, which its slowest stage decides."""
    times = [
        _stage_time(layout, number, batches, traced, hardware)
        for number in range(len(layout.stages))
    ]
    return max(times, key=lambda time: time.total)


def _stage_time(
    layout: Layout, number: int, batches: Batches, traced: TracedModel, hardware: Hardware
) -> StepTime:
    chunks, count = layout.stages[number].chunks, batches.num_microbatches
    kernels = stage_seconds(traced, chunks, FIRST)
    kernels += (count - 1) * stage_seconds(traced, chunks, FURTHER)
    tensor = _tensor_parallel_seconds(layout, chunks, count, traced, hardware)
    pipeline = count * _pipeline_seconds(layout, chunks, hardware)
    busy = kernels + tensor + pipeline
    bubble = busy * batches.bubble / (1 - batches.bubble)
    exposed = _data_parallel_seconds(layout, number, kernels / count, hardware)
    optimizer = _optimizer_seconds(layout, number, traced)
    reference = 0.0
    if layout.holds("reference"):  # forward of all micro-batches, in a pipeline of its own
        reference = (1 - BACKWARD_SHARE) * (busy + bubble)
    return StepTime(kernels, tensor, pipeline, bubble, optimizer, exposed, reference)


def stage_seconds(traced: TracedModel, chunks: Sequence[StageSpec], phase: str) -> float:
    """The kernels of a micro-batch (or once a step) on the stage of `chunks`."""
    layers = sum(len(part.layers) for part in chunks)
    embedding = any(part.has_embedding for part in chunks)
    head = any(part.has_head for part in chunks)
    ends = traced.ends.cost
    of_embedding = ends.total(phase, lambda purpose: purpose == EMBEDDING).seconds
    of_head = ends.total(phase).seconds - of_embedding
    of_layer = traced.layer.cost.total(phase).seconds
    return layers * of_layer + embedding * of_embedding + head * of_head


def _tensor_parallel_seconds(
    layout: Layout,
    chunks: Sequence[StageSpec],
    count: int,
    traced: TracedModel,
    hardware: Hardware,
) -> float:
    sent = tensor_parallel_bytes(traced, chunks, count)
    rate = _rate(hardware, layout.dims.tp, 1)
    return sum(EXPOSED[wire] * sent.get(wire, 0.0) for wire in TP_WIRES) / rate


def _pipeline_seconds(layout: Layout, chunks: Sequence[StageSpec], hardware: Hardware) -> float:
    """Messages that a stage waits for in a micro-batch: those of both directions."""
    if layout.dims.pp == 1:
        return 0.0
    received = sum((not part.has_head) + (not part.has_embedding) for part in chunks)
    rate = _rate(hardware, 2, layout.dims.stride("pp"))
    return received * pipeline_message(layout.config) / rate


def _data_parallel_seconds(
    layout: Layout, number: int, microbatch: float, hardware: Hardware
) -> float:
    """Gradients to their owners and weights from them, without what forward and backward hide."""
    dims, config, stage = layout.dims, layout.config, layout.stages[number]
    if dims.dp == 1:
        return 0.0
    network = GIGA * (hardware.network_gb_per_s if layout.num_nodes > 1 else 0.0)
    nvlink = GIGA * hardware.nvlink_gb_per_s
    reduced = gradient_bytes(config, dims, stage.weights, stage.rows, layout.node_size)
    seconds = max(sent.within / nvlink + sent.across / (network or nvlink) for sent in reduced)
    # Rings over several nodes leave each through the ports of all its ranks.
    per_node = max(1, min(dims.dp, layout.node_size // dims.stride("dp")))
    rate = min(nvlink, per_node * network) if network else nvlink
    stepped = parameter_bytes(config, stage.weights, stage.rows, stage.shards)
    means = gathered_gradient_bytes(config, stage.weights, stage.rows)  # where there is no ZeRO
    gathered = (max(stepped) + max(means)) / rate
    if config.parallel.overlap_grad_reduce:
        seconds = max(0.0, seconds - BACKWARD_SHARE * microbatch)
    if config.parallel.overlap_param_gather:
        gathered = max(0.0, gathered - (1 - BACKWARD_SHARE) * microbatch)
    return seconds + gathered


def _optimizer_seconds(layout: Layout, number: int, traced: TracedModel) -> float:
    """The fullest replica's share of what a rank that owns everything does once."""
    stage = layout.stages[number]
    whole = stage_seconds(traced, stage.chunks, ONCE)
    if not layout.config.parallel.use_distributed_optimizer:
        return whole
    return whole * max(stage.shards) / sum(stage.shards)


def _rate(hardware: Hardware, ranks: int, stride: int) -> float:
    """Bytes a second that a rank sends to one of `ranks` that are `stride` apart."""
    within = ranks * stride <= hardware.gpus_per_node
    return GIGA * (hardware.nvlink_gb_per_s if within else hardware.network_gb_per_s)


def mfu(flops: float, seconds: float, world_size: int, gemm: str, hardware: Hardware) -> float:
    """The share of the GPUs' data sheet that `flops` in `seconds` are, in the format `gemm`."""
    peak = hardware.peak_fp8_tflops if gemm == "fp8" else hardware.peak_bf16_tflops
    return flops / (seconds * world_size * peak * TERA)
