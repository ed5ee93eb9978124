"""Runs one optimizer step of a config's model on the meta device and records every launch.

Nothing is computed: tensors have shapes and strides, no memory. The kernels are those that a Hopper
GPU gets, and PyTorch checks the layouts of FP8 GEMMs as CUDA wants them. All ranks but this one are
PyTorch's fake process group. The number of launches does not depend on what is in a tensor, as a
step never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fp8lm.batch import Batch
from fp8lm.comm import WireCounter
from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import ProcessGroups
from fp8lm.config import Config
from fp8lm.kernels import Kernels
from fp8lm.kernels.cost import declare_launch, recording
from fp8lm.kernels.hopper import HopperKernels
from fp8lm.kernels.select import check_blocks_on_gpu, check_scaling_on_gpu, kernels_for_gpu
from fp8lm.layers.param import Param, QuantizedParam, trainable
from fp8lm.layers.recipe import Recipe
from fp8lm.model.objectives import MeanOfMicrobatches, Objective
from fp8lm.optim import AdamW, StatePrecision
from fp8lm.parallel.parallelize import build_tp_context, parallelize
from fp8lm.planner.tracing.costs import FIRST, FURTHER, ONCE, Cost, StepCost
from fp8lm.planner.tracing.launches import Launch, Operation
from fp8lm.planner.tracing.memory import Kind, LiveMemory, StepMemory
from fp8lm.planner.tracing.purposes import CAST, CallSites
from fp8lm.planner.tracing.roofline import Hardware
from fp8lm.telemetry.observing import ModelObserver, linears_of
from fp8lm.telemetry.table import StatisticsTable
from fp8lm.training.builders import build_model, build_objective, model_vocab_size
from fp8lm.training.step import train_step

META = torch.device("meta")
HOPPER = (9, 0)  # compute capability
CUDA = "12.9"
KERNELS = ("hopper", "triton")


def kernels_of(name: str | None) -> Kernels:
    """The kernels `name` (one of `KERNELS`), or those that a Hopper GPU gets."""
    if name is None:
        return kernels_for_gpu(HOPPER, "the traced device")
    if name == "hopper":
        return HopperKernels()
    from fp8lm.kernels.triton.backend import TritonKernels  # a package that may be missing

    return TritonKernels()


@dataclass(frozen=True)
class TracedStep:
    """What a step costs, the bytes it sends by (phase, wire), and the memory it holds."""

    cost: StepCost = field(default_factory=StepCost)
    wires: StepCost = field(default_factory=StepCost)
    memory: StepMemory = field(default_factory=StepMemory)

    def __add__(self, other: TracedStep) -> TracedStep:
        return TracedStep(
            self.cost + other.cost, self.wires + other.wires, self.memory + other.memory
        )

    def times(self, factor: float) -> TracedStep:
        """`factor` such steps."""
        return TracedStep(
            self.cost.times(factor), self.wires.times(factor), self.memory.times(factor)
        )

    def __sub__(self, other: TracedStep) -> TracedStep:
        return self + other.times(-1)


def trace_step(
    config: Config,
    num_ids: int,
    hardware: Hardware,
    world_size: int,
    kernels_name: str | None = None,
    *,
    observed: bool = False,
) -> TracedStep:
    """A step of two micro-batches, all of `config` but its numbers of those and data.

    `num_ids` is the size of the tokenizer's vocabulary. Rank 0 of `world_size`; no pipeline. An
    `observed` step computes the statistics of `logging.fp8_stats_interval`.
    """
    check_scaling_on_gpu(HOPPER, CUDA, config.precision)
    check_blocks_on_gpu(config)
    kernels, counter = kernels_of(kernels_name), WireCounter()
    with fake_groups(config, world_size) as groups:
        tp = build_tp_context(config, groups, kernels, counter)
        recipe = Recipe.from_config(config.precision, kernels, META, tp)
        model = build_model(config, model_vocab_size(config, num_ids), recipe)
        parallel = parallelize(config, groups, [model], kernels, counter, META)
        optimizer = AdamW(
            trainable(parallel.weights),
            config.optimizer,
            StatePrecision.from_config(config.precision),
            kernels,
            seed=config.train.seed,
            sharding=parallel.sharding,
        )
        for name, weight in optimizer.weights.items():
            optimizer.initialize(name, torch.empty(weight.spec.shape, device=META))
        objective: Objective = build_objective(config, num_ids, kernels, tp)
        if not config.train.calculate_per_token_loss:
            objective = MeanOfMicrobatches(objective)
        batches = [_batch(config) for _ in range(2)]
        vocabulary = model_vocab_size(config, num_ids) // groups.dims.tp
        memory = LiveMemory(state_tensors(parallel.weights, optimizer), vocabulary)
        recorder = StepRecorder(hardware, counter, memory)
        model.register_forward_pre_hook(lambda *_: recorder.next_microbatch())
        ranks = parallel.data_parallel, parallel.pipeline
        with ExitStack() as stack:
            stack.enter_context(FusedOperations(recorder.begin_backward))
            stack.enter_context(recording(recorder))
            stack.enter_context(recorder)
            if observed:
                observer = ModelObserver(linears_of([model]), optimizer, kernels)
                table = StatisticsTable(observer.rows, META)
                stack.enter_context(observer.observing(table))
            train_step(model, optimizer, objective, batches, 1e-3, *ranks, parallel.histories)
    return TracedStep(recorder.cost, recorder.wires, memory.of_step - _operands(parallel.weights))


def _operands(weights: Mapping[str, Param]) -> StepMemory:
    """FP8 copies of weights, which are held for the step and so no micro-batch's."""
    held = sum(w.operand_bytes for w in weights.values() if isinstance(w, QuantizedParam))
    return StepMemory({Kind(CAST, "uint8"): held}, held, held)


def state_tensors(weights: Mapping[str, Param], optimizer: AdamW) -> Iterator[Tensor]:
    """The tensors of weights, gradients and optimizer states, with their scales."""
    held = [kept for state in optimizer.states.values() for kept in state.stored]
    for weight in weights.values():
        held += [weight.model_param, weight.main_grad.value]
    for scaled in held:
        yield from (scaled.payload, scaled.scale)


def _batch(config: Config) -> Batch:
    shape = (config.train.micro_batch_size, config.model.seq_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=META)
    mask = torch.ones(shape, device=META)
    batch = Batch(tokens, tokens, mask, sample_ids=torch.zeros_like(tokens[:, 0]))
    if config.train.objective != "dpo":
        return batch
    bounds = torch.zeros((shape[0], 3), dtype=torch.int64, device=META)  # of a pair
    return replace(batch, sequence_bounds=bounds, reference_losses=torch.zeros_like(mask))


@contextmanager
def fake_groups(config: Config, world_size: int) -> Iterator[ProcessGroups]:
    """The groups of rank 0 of `world_size` processes that are not there."""
    dims = ParallelDims.from_config(config.parallel, world_size)
    dist.init_process_group("fake", rank=0, world_size=world_size)
    try:
        tp, dp, pp = (_group(dims.rank_lists(axis)) for axis in ("tp", "dp", "pp"))
        world = dist.group.WORLD
        assert world is not None
        yield ProcessGroups(dims, world, tp, dp, pp, saving=world)
    finally:
        dist.destroy_process_group()


def _group(ranks: list[list[int]]) -> dist.ProcessGroup:
    group, _ = dist.new_subgroups_by_enumeration(ranks)
    assert group is not None  # rank 0 is in every kind of group
    return group


class StepRecorder(TorchDispatchMode):
    """Adds up the launches of all operations that run while it is entered; a `CostRecorder`.

    Tensors that they make are shown to `memory`.
    """

    def __init__(
        self, hardware: Hardware, counter: WireCounter, memory: LiveMemory | None = None
    ) -> None:
        super().__init__()
        self.cost, self.wires = StepCost(), StepCost()
        self.hardware, self.counter, self.memory = hardware, counter, memory
        self._sites = CallSites()
        self._microbatches = 0
        self._sent = counter.sent

    def next_microbatch(self) -> None:
        """A micro-batch begins."""
        self._microbatches += 1

    def begin_backward(self) -> None:
        """The forward of a micro-batch is over."""
        if self.memory is not None:
            self.memory.begin_backward()

    def record(self, name: str, reads: int, writes: int) -> None:
        """See `fp8lm.kernels.cost.CostRecorder`."""
        self._add(name, [Launch(name, reads, writes, declared=True)], is_scalar=False)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._add_collective()
        elif func.namespace != "prim":
            operation = Operation.of(func, args, kwargs, result)
            made = operation.results
            self._add(operation.name, operation.launches(), made, is_scalar=operation.is_scalar)
        return result

    def _add(
        self, name: str, launches: list[Launch], made: Iterable[Tensor] = (), *, is_scalar: bool
    ) -> None:
        # Of a view too: what its backward is for is looked up by it.
        phase, purpose = self._where(name, is_scalar=is_scalar)
        if self.memory is not None:
            for tensor in made:
                self.memory.see(tensor, purpose, in_microbatch=phase != ONCE)
        for launch in launches:
            seconds = self.hardware.seconds(launch, purpose)
            self.cost.add(phase, purpose, Cost(1, launch.moved, launch.flops, seconds))

    def _add_collective(self) -> None:
        """What was sent since the last one; a collective counts its bytes just before it starts."""
        phase, purpose = self._where("collective", is_scalar=False)
        before, self._sent = self._sent, self.counter.sent
        sent = {wire: total - before[wire] for wire, total in self._sent.items()}
        self.cost.add(phase, purpose, Cost(collectives=1, sent=sum(sent.values())))
        for wire, size in sent.items():
            if size:
                self.wires.add(phase, wire, Cost(collectives=1, sent=size))

    def _where(self, name: str, *, is_scalar: bool) -> tuple[str, str]:
        site = self._sites.locate(name, is_scalar=is_scalar)
        if not site.in_microbatch or not self._microbatches:
            return ONCE, site.purpose
        return FIRST if self._microbatches == 1 else FURTHER, site.purpose


class FusedOperations(TorchFunctionMode):
    """Operations that are one kernel on Hopper, and several on the meta device.

    `before_backward` is called when the backward of a loss begins.
    """

    def __init__(self, before_backward: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._before_backward = before_backward

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _flash_attention(*args, **kwargs)
        if func is functional.rms_norm:
            return _rms_norm(*args, **kwargs)
        if func is Tensor.backward:
            return self._backward(args[0], kwargs["gradient"])
        return func(*args, **kwargs)

    def _backward(self, y: Tensor, dy: Tensor | None) -> None:
        """As `y.backward(dy)`, but within this mode: forwards run here too, of recomputed layers.

        PyTorch leaves a mode before it calls what the mode may replace, as all its functions are.
        """
        self._before_backward()
        with self:
            _engine_run_backward(
                (y,),
                (torch.ones_like(y) if dy is None else dy,),
                False,
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )


def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> Tensor:
    flash = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001
    return flash(q, k, v, dropout_p, is_causal)[0]


def _rms_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    return _RmsNorm.apply(x, weight)


class _RmsNorm(torch.autograd.Function):
    """One kernel in forward; in backward one for the input's gradient and one for the weight's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], device=x.device)
        declare_launch("rms_norm", [x, weight], [y, rstd])
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, rstd = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        declare_launch("rms_norm_backward", [dy, x, weight, rstd], [dx])
        declare_launch("rms_norm_weight_backward", [dy, x, rstd], [dw])
        return dx, dw
