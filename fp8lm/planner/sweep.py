"""A search over tensor and pipeline parallelism, micro-batch and recomputation.

All layouts whose sizes divide the GPUs, the layers and the batch are estimated. Recomputation is
tried where nothing fits without it: it runs a third more of the arithmetic, which a larger
micro-batch does not bring back. A micro-batch's cost lies on the line through those of 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from fp8lm.config import Config
from fp8lm.numerics import format_by_name
from fp8lm.planner.batches import plan_batches
from fp8lm.planner.describe import aligned
from fp8lm.planner.estimate import Estimate, as_facts, trace_for
from fp8lm.planner.layout import plan_layout
from fp8lm.planner.report import TIMES
from fp8lm.planner.tracing.floor import matrix_parameters
from fp8lm.planner.tracing.model import TracedModel, with_keys
from fp8lm.planner.tracing.roofline import GIGA, Hardware
from fp8lm.runtime.errors import InputError

MICRO_BATCHES = (1, 2, 4, 8, 16)
MOST_STAGES = 64
SHOWN = 5
MS = 1e3


@dataclass(frozen=True)
class Division:
    """Sizes of tensor and pipeline parallelism."""

    tensor: int
    pipeline: int

    @property
    def overrides(self) -> list[str]:
        """Of a config, whose own division into stages they replace."""
        return [
            f"parallel.tensor_model_parallel_size={self.tensor}",
            f"parallel.sequence_parallel={str(self.tensor > 1).lower()}",
            f"parallel.pipeline_model_parallel_size={self.pipeline}",
            "parallel.num_layers_per_virtual_pipeline_stage=null",
            "parallel.decoder_first_pipeline_num_layers=null",
            "parallel.decoder_last_pipeline_num_layers=null",
        ]

    def __str__(self) -> str:
        return f"TP {self.tensor}, PP {self.pipeline}"


@dataclass(frozen=True)
class Tried:
    """What became of a division, with a micro-batch if it came to that."""

    division: Division
    micro_batch: int | None = None
    recompute: str | None = None
    estimate: Estimate | None = None
    refused: str = ""

    def __str__(self) -> str:
        size = "" if self.micro_batch is None else f", micro-batches of {self.micro_batch}"
        return f"{self.division}{size}{' with recomputation' if self.recompute else ''}"


def divisions(config: Config, world_size: int, hardware: Hardware) -> list[Division]:
    """Those whose sizes divide the GPUs and the layers."""
    return [
        Division(tensor, pipeline)
        for tensor in _powers_of_two(hardware.gpus_per_node)
        for pipeline in range(1, MOST_STAGES + 1)
        if config.model.num_layers % pipeline == 0 and world_size % (tensor * pipeline) == 0
    ]


def _powers_of_two(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2


class Sweep:
    """Estimates divisions one after the other; traces are kept for those that share them."""

    def __init__(self, num_ids: int, world_size: int, hardware: Hardware) -> None:
        self.num_ids, self.world_size, self.hardware = num_ids, world_size, hardware
        self._traced: dict[tuple[int, str | None, int], TracedModel] = {}

    def of(self, config: Config, division: Division) -> list[Tried]:
        """Every micro-batch of `config`, which is divided so."""
        parallel = config.parallel
        replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        batch, dp = config.train.global_batch_size, self.world_size // replica
        sizes = [size for size in MICRO_BATCHES if batch % (size * dp) == 0]
        if not sizes:
            return [Tried(division, refused=f"a batch of {batch} does not divide by {dp} replicas")]
        held, room = _weights_and_gradients(config), GIGA * self.hardware.memory_gb
        if held > room:
            why = f"weights and gradients alone are {held / GIGA:.0f} GB"
            return [Tried(division, refused=why)]
        node_size = min(self.world_size, parallel.node_size or self.hardware.gpus_per_node)
        layout = plan_layout(config, self.num_ids, self.world_size, node_size)
        if (held := max(max(stage.totals) for stage in layout.stages)) > room:
            why = f"weights, gradients and optimizer states alone are {held / GIGA:.0f} GB"
            return [Tried(division, refused=why)]
        tried: list[Tried] = []
        for recompute in (None, "full"):
            for size in sizes:
                keys = {"micro_batch_size": size, "recompute_granularity": recompute}
                changed = with_keys(config, train=keys)
                of = Estimate(
                    replace(layout, config=changed),
                    plan_batches(changed, dp),
                    self.num_ids,
                    self.hardware,
                    self._trace(changed, size),
                    partial(self._trace, changed, 2 * size),
                )
                if not of.fits:
                    tried.append(Tried(division, size, recompute, refused=_why_not(of)))
                    break
                tried.append(Tried(division, size, recompute, of))
            if any(each.estimate for each in tried):
                break
        return tried

    def _trace(self, config: Config, size: int) -> TracedModel:
        """A micro-batch of `size`, which is on the line through those of 1 and 2."""
        one = self._trace_once(config, 1)
        return one if size == 1 else one.with_micro_batch(self._trace_once(config, 2), size)

    def _trace_once(self, config: Config, size: int) -> TracedModel:
        """The trace of all divisions that differ by their stages alone."""
        key = config.parallel.tensor_model_parallel_size, config.train.recompute_granularity, size
        if key not in self._traced:
            config = with_keys(config, train={"micro_batch_size": size})
            self._traced[key] = trace_for(config, self.num_ids, self.hardware)
        return self._traced[key]


def _weights_and_gradients(config: Config) -> float:
    """Bytes of the matrices of a stage's layers and of their gradients, on a rank."""
    precision, parallel = config.precision, config.parallel
    stored = format_by_name(precision.params_dtype), format_by_name(precision.main_grads_dtype)
    layers = config.model.num_layers // parallel.pipeline_model_parallel_size
    return layers * matrix_parameters(config) * sum(fmt.bytes for fmt in stored)


def ranking(tried: list[Tried]) -> list[Tried]:
    """Those that fit, the fastest first, with the best micro-batch of each division."""
    fitting = [each for each in tried if each.estimate is not None]
    fitting.sort(key=lambda each: each.estimate.time.total if each.estimate else 0.0)
    best: dict[Division, Tried] = {}
    for each in fitting:
        best.setdefault(each.division, each)
    return list(best.values())


def describe(tried: list[Tried], world_size: int, hardware: Hardware) -> str:
    """The best as a table, and a line for each other division that says why it loses."""
    ranked = ranking(tried)
    if not ranked:
        raise InputError(
            f"nothing fits {world_size} x {hardware.name}: {_refusals(tried)}: take more GPUs, "
            "another --gpu or preset"
        )
    rows: list[tuple[str, ...]] = [
        ("TP", "PP", "DP", "micro-batch", "recompute", "GB", "step, ms", "MFU", "tokens/s/GPU")
    ]
    for each in ranked[:SHOWN]:
        of = each.estimate
        assert of is not None  # it is among those that fit
        rows.append(
            (
                str(each.division.tensor),
                str(each.division.pipeline),
                str(of.layout.dims.dp),
                str(each.micro_batch),
                each.recompute or "no",
                f"{of.fullest.total / GIGA:.1f}",
                f"{MS * of.time.total:.0f}",
                f"{of.mfu:.1%}",
                f"{of.tokens_per_second:.0f}",
            )
        )
    lines = [f"{world_size} x {hardware.name}, predicted, not measured", *aligned(rows, left=set())]
    best = ranked[0].estimate
    assert best is not None
    lines += [f"{each}: {_why_slower(each.estimate, best)}" for each in ranked[1:] if each.estimate]
    known = {each.division for each in ranked}
    last = {each.division: each for each in tried if each.division not in known}
    return "\n".join([*lines, *(f"{each}: {each.refused}" for each in last.values())])


def _why_not(of: Estimate) -> str:
    """What it needs, and the component that is largest."""
    components, room = of.fullest.components, of.hardware.memory_gb
    largest = max(components, key=lambda name: components[name])
    return (
        f"needs {of.fullest.total / GIGA:.0f} of {room:.0f} GB, {components[largest] / GIGA:.0f} "
        f"of them {largest}"
    )


def _why_slower(of: Estimate, best: Estimate) -> str:
    """How much, and the part of the time that grew most."""
    more = {part: getattr(of.time, part) - getattr(best.time, part) for part in TIMES}
    part = max(more, key=lambda name: more[name])
    slower = of.time.total / best.time.total - 1
    return f"{slower:.1%} slower; {TIMES[part]}: {MS * more[part]:+.0f} ms"


def _refusals(tried: list[Tried]) -> str:
    last = tried[-1]
    return f"{last}: {last.refused}"


def facts(tried: list[Tried]) -> list[dict[str, object]]:
    """The numbers of the best, for machines."""
    return [
        {
            "tensor_model_parallel_size": each.division.tensor,
            "pipeline_model_parallel_size": each.division.pipeline,
            "micro_batch_size": each.micro_batch,
            "recompute_granularity": each.recompute,
            **as_facts(each.estimate),
        }
        for each in ranking(tried)[:SHOWN]
        if each.estimate
    ]
