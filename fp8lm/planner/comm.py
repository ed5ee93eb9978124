"""Bytes that a rank sends in a step, by wire, in the terms of `fp8lm.comm.accounting`.

    grads      to the owners, d replicas of N bytes     (d-1)/d N
               by nodes of m                            (m-1)/m N within, (1/m - 1/d) N across
    params     of the owners, d replicas of N bytes     (d-1)/d N
    pipeline   a message per micro-batch, chunk and direction that leaves the stage
    tp_*       what a traced step has counted, by layers and micro-batches

The sizes N are those of messages, with scales and padding. What a rank owns decides how far it is
from the mean. (FP8-LM, arXiv 2310.18313, Tables 5 and 7, has the volumes of 7B, 13B and 175B.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fp8lm.comm import Wire, WireCounter
from fp8lm.comm.accounting import WIRES, all_reduce_sent
from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import replicas_per_node
from fp8lm.comm.p2p import PipelineP2P
from fp8lm.config import Config
from fp8lm.gradient.reduction import sent_format
from fp8lm.kernels.hopper import HopperKernels
from fp8lm.layers.param import Param
from fp8lm.layers.shard_spec import LocalShards
from fp8lm.model.decoder import StageSpec
from fp8lm.numerics import BF16, FP32, Format, granularity_of
from fp8lm.optim.step_scalars import NUM_GATHERED
from fp8lm.parallel.parallelize import WORD_TABLE
from fp8lm.planner.layout import Layout
from fp8lm.planner.tracing.costs import FIRST, FURTHER, ONCE
from fp8lm.planner.tracing.model import TracedModel

ALIGNMENT, SCALE_BYTES, FP32_BYTES = 16, 4, 4
AMAXES = 4  # of each parameter: gradient, master, both moments
# Sequence parallelism gathers and reduces for a column-parallel layer (the head) 2 and 1 times, for
# a row-parallel one (the embedding) 1 and 1 times; without it a layer of either kind reduces once.
HEAD_SHARE = {"tp_gather": 2 / 3, "tp_reduce": 1 / 2}
TP_WIRES = tuple(HEAD_SHARE)
GRADS, PARAMS, PIPELINE = "grads", "params", "pipeline"


@dataclass(frozen=True)
class ReductionBytes:
    """Bytes of gradients that a rank sends to others `within` its node, and `across` nodes."""

    within: int
    across: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.within + self.across


def gradient_bytes(
    config: Config,
    dims: ParallelDims,
    weights: Mapping[str, Param],
    rows: Sequence[LocalShards],
    node_size: int,
) -> list[ReductionBytes]:
    """What each replica sends to the owners of `rows`, with `node_size` processes on a machine."""
    wire = Wire.of_key("grads", config.precision.wire, WireCounter())
    owners = [_message(wire, weights, own) for own in rows]
    per_node = summed_per_node(config, dims, node_size)
    if per_node is None:
        return [ReductionBytes(0, sum(owners) - own) for own in owners]
    whole = sum(owners)
    alike = [sum(owners[number::per_node]) for number in range(per_node)]
    return [
        ReductionBytes(whole - alike[replica % per_node], alike[replica % per_node] - own)
        for replica, own in enumerate(owners)
    ]


def summed_per_node(config: Config, dims: ParallelDims, node_size: int) -> int | None:
    """Replicas of a machine that sum gradients before these cross; None: none do."""
    if dims.dp == 1 or config.precision.grad_reduce != "fp32_accumulate":
        return None
    given = config.parallel.node_size
    size = given or node_size
    return replicas_per_node(dims.dp, dims.stride("dp"), size, given=given is not None)


def _message(wire: Wire, params: Mapping[str, Param], rows: LocalShards) -> int:
    """The message with the gradients of `rows`: see `fp8lm.comm.message`."""
    payload = scales = 0
    for name, (first, last) in rows.items():
        spec = params[name].spec
        fmt = sent_format(spec.grad_format, wire, keep_high_precision=spec.keep_high_precision)
        elements = (last - first) * math.prod(spec.local_shape[1:])
        payload += _padded(elements * fmt.bytes)
        scales += _num_scales(fmt, spec.local_shape, last - first)
    return _padded(payload + SCALE_BYTES * scales)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _num_scales(fmt: Format, shape: tuple[int, ...], rows: int) -> int:
    if not fmt.scaled:
        return 0
    granularity = granularity_of(fmt, shape)
    if granularity.is_per_tensor:
        return 1
    return math.prod(granularity.scale_shape(shape)) * rows // shape[0]


def parameter_bytes(
    config: Config, weights: Mapping[str, Param], rows: Sequence[LocalShards], shards: Sequence[int]
) -> list[int]:
    """What each replica passes on of the stepped weights; `shards[r]` are the bytes that r owns."""
    if not config.parallel.use_distributed_optimizer:
        return [0] * len(shards)
    precision = config.precision
    if precision.params_dtype == "fp8_e4m3" and precision.wire.params == "bf16":
        shards = [
            2 * sum((b - a) * math.prod(weights[n].spec.local_shape[1:]) for n, (a, b) in r.items())
            for r in rows
        ]
    return _passed_on(shards)


def gathered_gradient_bytes(
    config: Config, weights: Mapping[str, Param], rows: Sequence[LocalShards]
) -> list[int]:
    """Without ZeRO: what each replica passes on of the gradients' means, which all need."""
    if config.parallel.use_distributed_optimizer:
        return [0] * len(rows)
    wire = Wire.of_key("grads", config.precision.wire, WireCounter())
    return _passed_on([_message(wire, weights, own) for own in rows])


def _passed_on(sizes: Sequence[int]) -> list[int]:
    """In a ring of broadcasts a rank sends everything on but what its neighbour has sent."""
    whole = sum(sizes)
    return [whole - sizes[(rank + 1) % len(sizes)] for rank in range(len(sizes))]


def scalar_bytes(dims: ParallelDims, num_weights: int) -> int:
    """The step's scalars, of all ranks, and the amaxes of all weights."""
    gathered = (dims.world_size - 1) * NUM_GATHERED * FP32_BYTES
    return gathered + all_reduce_sent(dims.tp * dims.dp, num_weights * AMAXES * FP32_BYTES)


def pipeline_message(config: Config) -> int:
    """Bytes of a micro-batch's hidden states between two stages."""
    model, parallel, precision = config.model, config.parallel, config.precision
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    shape = (model.seq_length // split, config.train.micro_batch_size, model.hidden_size)
    wire = Wire.of_key("pipeline", precision.wire, WireCounter())
    dtype = (FP32 if precision.gemm == "fp32" else BF16).dtype
    return PipelineP2P(shape, dtype, wire, HopperKernels()).nbytes


def pipeline_bytes(
    config: Config,
    chunks: Sequence[StageSpec],
    weights: Mapping[str, Param],
    microbatches: int,
) -> int:
    """What a rank of the stage of `chunks` sends to other stages."""
    if config.parallel.pipeline_model_parallel_size == 1:
        return 0
    messages = sum((not part.has_head) + (not part.has_embedding) for part in chunks)
    sent = microbatches * messages * pipeline_message(config)
    tied = not config.model.untie_embeddings_and_output_weights
    ends = any(part.has_head or part.has_embedding for part in chunks)
    if tied and ends and WORD_TABLE in weights:
        sent += all_reduce_sent(2, FP32_BYTES * math.prod(weights[WORD_TABLE].spec.local_shape))
    return sent


def tensor_parallel_bytes(
    traced: TracedModel, chunks: Sequence[StageSpec], microbatches: int
) -> dict[str, float]:
    """What a rank of the stage of `chunks` sends on the wires of tensor parallelism."""
    layers = dict.fromkeys(TP_WIRES, float(sum(len(part.layers) for part in chunks)))
    sent: dict[str, float] = dict.fromkeys(TP_WIRES, 0.0)
    for step, shares in ((traced.layer, layers), (traced.ends, _shares_of_ends(chunks))):
        for phase, times in ((FIRST, 1), (FURTHER, microbatches - 1), (ONCE, 1)):
            by_wire = step.wires.by_purpose(phase)
            for wire in TP_WIRES:
                if wire in by_wire:
                    sent[wire] += times * shares[wire] * by_wire[wire].sent
    return sent


def _shares_of_ends(chunks: Sequence[StageSpec]) -> dict[str, float]:
    """Of what embedding and head send together, by wire."""
    head = any(part.has_head for part in chunks)
    embedding = any(part.has_embedding for part in chunks)
    return {wire: head * share + embedding * (1 - share) for wire, share in HEAD_SHARE.items()}


def stage_bytes(
    layout: Layout, number: int, traced: TracedModel, microbatches: int
) -> list[dict[str, float]]:
    """What each replica of pipeline stage `number` sends in a step, by wire."""
    config, dims, stage = layout.config, layout.dims, layout.stages[number]
    weights, rows = stage.weights, stage.rows
    alike: dict[str, float] = dict.fromkeys(WIRES, 0.0)
    alike |= tensor_parallel_bytes(traced, stage.chunks, microbatches)
    alike[PIPELINE] = pipeline_bytes(config, stage.chunks, weights, microbatches)
    scalars = scalar_bytes(dims, len(weights))
    if dims.dp == 1:
        return [alike | {GRADS: scalars}]
    to_owners = gradient_bytes(config, dims, weights, rows, layout.node_size)
    to_all = gathered_gradient_bytes(config, weights, rows)
    stepped = parameter_bytes(config, weights, rows, stage.shards)
    return [
        alike | {GRADS: scalars + reduced.total + gathered, PARAMS: sent}
        for reduced, gathered, sent in zip(to_owners, to_all, stepped, strict=True)
    ]
