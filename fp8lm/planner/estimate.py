"""What a run would cost on a kind of GPU: memory, bytes on the wires, time, largest micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain

from fp8lm.comm.accounting import WIRES
from fp8lm.config import Config
from fp8lm.parallel.stages import schedule_maker
from fp8lm.planner.batches import Batches, plan_batches
from fp8lm.planner.comm import stage_bytes
from fp8lm.planner.layout import Layout, RankPlacement
from fp8lm.planner.memory import RankMemory, stage_memory
from fp8lm.planner.time import StepTime, mfu, step_time
from fp8lm.planner.tracing.model import TracedModel, trace_model, with_keys
from fp8lm.planner.tracing.roofline import GIGA, Hardware
from fp8lm.training.builders import model_vocab_size
from fp8lm.training.flops import training_flops

KERNELS = {"auto": None, "eager": "hopper", "triton": "triton"}  # by `precision.kernels`
LARGEST_MICRO_BATCH = 64


@dataclass(frozen=True)
class Estimate:
    """The costs of `layout`, whose micro-batch has been `traced`.

    `trace_doubled` traces one of twice the size, when it is asked for.
    """

    layout: Layout
    batches: Batches
    num_ids: int
    hardware: Hardware
    traced: TracedModel
    trace_doubled: Callable[[], TracedModel]

    @cached_property
    def memory(self) -> list[list[RankMemory]]:
        """Of the replicas of every stage."""
        return self._memory(self.traced)

    def memory_of(self, place: RankPlacement) -> RankMemory:
        """That of the rank at `place`."""
        return self.memory[place.stage][place.data]

    @cached_property
    def fullest(self) -> RankMemory:
        """That of the rank that holds most."""
        return max(chain(*self.memory), key=lambda rank: rank.total)

    @property
    def least(self) -> float:
        """Bytes of the rank that holds least."""
        return min(rank.total for rank in chain(*self.memory))

    @property
    def fits(self) -> bool:
        """Whether all ranks have room."""
        return self.fullest.total <= GIGA * self.hardware.memory_gb

    @cached_property
    def wires(self) -> list[list[dict[str, float]]]:
        """Bytes sent in a step by wire, of the replicas of every stage."""
        count = self.batches.num_microbatches
        stages = range(len(self.layout.stages))
        return [stage_bytes(self.layout, stage, self.traced, count) for stage in stages]

    def sent_by(self, place: RankPlacement) -> dict[str, float]:
        """What the rank at `place` sends in a step, by wire."""
        return self.wires[place.stage][place.data]

    @property
    def most_sent(self) -> dict[str, float]:
        """By wire, of the rank that sends most on it."""
        return {wire: max(sent[wire] for sent in chain(*self.wires)) for wire in WIRES}

    @cached_property
    def time(self) -> StepTime:
        """Of a step."""
        return step_time(self.layout, self.batches, self.traced, self.hardware)

    @property
    def flops(self) -> float:
        """The model's, of a step."""
        model = self.layout.config.model
        rows = model_vocab_size(self.layout.config, self.num_ids)
        return training_flops(model, rows, [model.seq_length]) * self.batches.global_batch_size

    @property
    def mfu(self) -> float:
        """The share of the data sheet's peak of its GEMMs' format."""
        world_size, gemm = self.layout.dims.world_size, self.layout.config.precision.gemm
        return mfu(self.flops, self.time.total, world_size, gemm, self.hardware)

    @property
    def tokens_per_second(self) -> float:
        """Per GPU."""
        tokens = self.batches.tokens_per_step / self.layout.dims.world_size
        return tokens / self.time.total

    @cached_property
    def largest_micro_batch(self) -> int:
        """That fits and divides the batch; 0: none."""
        batch, replicas = self.batches.global_batch_size, self.batches.num_replicas
        size, larger = self.batches.micro_batch_size, self._memory(self.trace_doubled())
        this, twice = self.fullest.total, max(rank.total for rank in chain(*larger))
        fitting = [
            candidate
            for candidate in range(1, LARGEST_MICRO_BATCH + 1)
            if batch % (candidate * replicas) == 0
            and this + (candidate / size - 1) * (twice - this) <= GIGA * self.hardware.memory_gb
        ]
        return max(fitting, default=0)

    def _memory(self, traced: TracedModel) -> list[list[RankMemory]]:
        config, dims = self.layout.config, self.layout.dims
        parallel = config.parallel
        chunks = parallel.num_chunks(config.model.num_layers)
        make = schedule_maker(parallel.pipeline_schedule, dims.pp, chunks)
        in_flight = make(self.batches.num_microbatches).in_flight
        return [
            stage_memory(self.layout, stage, traced, in_flight[stage], self.hardware)
            for stage in range(dims.pp)
        ]


def estimate(layout: Layout, num_ids: int, hardware: Hardware) -> Estimate:
    """The costs of `layout`; InputError if batches do not divide."""
    config = layout.config
    batches = plan_batches(config, layout.dims.dp)
    traced = trace_for(config, num_ids, hardware)
    doubled = with_keys(config, train={"micro_batch_size": 2 * config.train.micro_batch_size})
    trace_doubled = partial(trace_for, doubled, num_ids, hardware)
    return Estimate(layout, batches, num_ids, hardware, traced, trace_doubled)


def trace_for(config: Config, num_ids: int, hardware: Hardware) -> TracedModel:
    """The model of `config` with the kernels that it asks for.

    Transposed copies that are cached belong to the state: memory is traced apart, without them.
    """
    kernels = KERNELS[config.precision.kernels]
    traced = trace_model(config, num_ids, hardware, kernels)
    if not config.precision.cache_weight_operands:
        return traced
    plain = with_keys(config, precision={"cache_weight_operands": False})
    return traced.with_memory_of(trace_model(plain, num_ids, hardware, kernels))


def as_facts(estimate: Estimate) -> dict[str, object]:
    """The numbers of `estimate`, for machines; memory in units of 1e9 bytes."""
    fullest = estimate.fullest
    saved = sorted(fullest.saved.items(), key=lambda item: -item[1])
    return {
        "preset": estimate.layout.config.precision.preset,
        "memory_gb": {
            "least": estimate.least / GIGA,
            "most": fullest.total / GIGA,
            "by_component": _in_giga(fullest.components),
            "saved_by_tensor": {str(kind): size / GIGA for kind, size in saved},
            "fits": estimate.fits,
        },
        "wire_bytes": {wire: round(sent) for wire, sent in estimate.most_sent.items()},
        "step_ms": 1e3 * estimate.time.total,
        "step_ms_by_part": {part: 1e3 * s for part, s in vars(estimate.time).items()},
        "mfu": estimate.mfu,
        "tokens_per_second_per_gpu": estimate.tokens_per_second,
        "bubble": estimate.batches.bubble,
        "largest_micro_batch": estimate.largest_micro_batch,
    }


def _in_giga(components: Mapping[str, float]) -> dict[str, float]:
    return {name: size / GIGA for name, size in components.items()}
