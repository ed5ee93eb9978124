"""Memory of a rank by component, from its layout and from a traced step.

    weights, grads, optimizer    what `state_bytes/*` counts, byte for byte
    operands                     `precision.cache_weight_operands`
    reference                    the frozen model of preference training
    activations                  saved from forward to backward, micro-batches in flight times
                                 layers, by the tensor
    logits                       with the sums of cross-entropy
    working                      the rest of the most that lives at once in a micro-batch: outputs
                                 and gradients under way, weight gradients before they are added
    communication                gradients on their way to their owners, messages between stages
    context                      CUDA, its libraries, and NCCL

The fragments that an allocator cannot use are not counted.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fp8lm.comm import Wire, WireCounter
from fp8lm.comm.dims import ParallelDims
from fp8lm.config import Config
from fp8lm.gradient.buckets import UNDER_WAY
from fp8lm.gradient.reduction import sent_format
from fp8lm.layers.param import Param
from fp8lm.layers.shard_spec import LocalShards
from fp8lm.model.decoder import StageSpec
from fp8lm.planner.comm import pipeline_message, summed_per_node
from fp8lm.planner.layout import STATES, Layout
from fp8lm.planner.tracing.memory import AT_HEAD, Kind, StepMemory
from fp8lm.planner.tracing.model import TracedModel
from fp8lm.planner.tracing.purposes import EMBEDDING
from fp8lm.planner.tracing.roofline import GIGA, Hardware

FP32_BYTES = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes by component; `saved` divides activations and logits by the tensor."""

    components: Mapping[str, float]
    saved: Mapping[Kind, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All components together."""
        return sum(self.components.values())


def stage_memory(
    layout: Layout, number: int, traced: TracedModel, in_flight: int, hardware: Hardware
) -> list[RankMemory]:
    """Memory of every replica of pipeline stage `number`.

    `in_flight` are the micro-batches whose activations a stage holds at once, of each chunk.
    """
    config, stage = layout.config, layout.stages[number]
    saved = saved_tensors(traced, stage.chunks, in_flight)
    at_head = sum(size for kind, size in saved.items() if kind.purpose in AT_HEAD)
    working = working_bytes(traced, stage.chunks)
    groups = num_communicators(config, layout.dims, layout.node_size)
    context = GIGA * (hardware.context_gb + hardware.communicator_gb * groups)
    messages = 0.0
    if layout.dims.pp > 1:  # sent ones are held until they have arrived, a received one is read
        messages = (2 * in_flight + 1) * pipeline_message(config)
    buffers = reduction_buffers(layout, stage.weights, stage.rows)
    ranks = []
    for state, buffer in zip(stage.state, buffers, strict=True):
        components = {
            "weights": state["weights"],
            "grads": state["grads"],
            "optimizer": sum(state[kind] for kind in STATES),
            "operands": state["operands"],
            "reference": state["reference"],
            "activations": sum(saved.values()) - at_head,
            "logits": at_head,
            "working": working,
            "communication": buffer + messages,
            "context": context,
        }
        ranks.append(RankMemory(components, saved))
    return ranks


def saved_tensors(
    traced: TracedModel, chunks: Sequence[StageSpec], in_flight: int
) -> dict[Kind, float]:
    """Bytes that a stage of `chunks` saves for backward, by kind."""
    saved: dict[Kind, float] = defaultdict(float)
    per_chunk = max(len(part.layers) for part in chunks)
    for kind, size in traced.layer.memory.saved.items():
        saved[kind] += in_flight * per_chunk * size
    for kind, size in traced.ends.memory.saved.items():
        if kind.purpose == EMBEDDING:
            saved[kind] += in_flight * size * any(part.has_embedding for part in chunks)
        else:  # the head's backward follows its forward
            saved[kind] += size * any(part.has_head for part in chunks)
    return {kind: size for kind, size in saved.items() if size > 0}


def working_bytes(traced: TracedModel, chunks: Sequence[StageSpec]) -> float:
    """The most that a micro-batch holds beside what it saves."""
    one: StepMemory = traced.of_layers(1).memory
    in_layers = one.peak_in_layers - one.saved_in_layers
    if not any(part.has_head for part in chunks):
        return max(in_layers, 0.0)
    # While layers are in backward, nothing is left of the head.
    return max(one.peak - sum(one.saved.values()), in_layers - one.saved_at_head, 0.0)


def reduction_buffers(
    layout: Layout, weights: Mapping[str, Param], rows: Sequence[LocalShards]
) -> list[float]:
    """Messages of gradients, of each replica: buckets under way, and what its rows receive.

    An owner gets a message from each of its machine's replicas (from all, where these do no sums),
    and adds them up in fp32.
    """
    config, dims = layout.config, layout.dims
    if dims.dp == 1:
        return [0.0]
    wire = Wire.of_key("grads", config.precision.wire, WireCounter())
    sent = {name: _sent_bytes(weight, wire) for name, weight in weights.items()}
    sizes = [weight.spec.numel * sent[name] for name, weight in weights.items()]
    bucket = config.parallel.ddp_bucket_size * min(sent.values())
    under_way = UNDER_WAY * min(max(bucket, *sizes), sum(sizes))
    senders = summed_per_node(config, dims, layout.node_size) or dims.dp
    largest = [0.0] * senders  # of a tensor's rows, by number on the machine
    for owner, own in enumerate(rows):
        for name, (first, last) in own.items():
            elements = (last - first) * math.prod(weights[name].spec.local_shape[1:])
            received = elements * ((senders - 1) * sent[name] + FP32_BYTES)
            largest[owner % senders] = max(largest[owner % senders], received)
    return [under_way + largest[replica % senders] for replica in range(dims.dp)]


def _sent_bytes(weight: Param, wire: Wire) -> int:
    spec = weight.spec
    return sent_format(spec.grad_format, wire, keep_high_precision=spec.keep_high_precision).bytes


def num_communicators(config: Config, dims: ParallelDims, node_size: int) -> int:
    """Groups of several ranks that a rank is in, each of which has buffers of NCCL."""
    groups = [
        dims.world_size > 1,  # scalars of the step
        dims.tp > 1,
        dims.dp > 1,
        dims.tp > 1 and dims.dp > 1,  # amaxes of weights
        dims.pp > 1,  # to later stages
        dims.pp > 1,  # to earlier stages
    ]
    by_node = 2 * (summed_per_node(config, dims, node_size) is not None)
    return sum(groups) + by_node
