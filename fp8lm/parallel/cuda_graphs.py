"""Micro-batches as CUDA graphs: forward, backward and the sums of gradients in one launch each.

    first      casts what weights are to be cast for the step, overwrites the gradients
    further    adds to the gradients

A replay reads what differs from one micro-batch to the next in tensors that stay in place: the
batch with the numbers of its samples, from which dropout draws; the share of a micro-batch in the
step; weights, their scales, histories of amaxes. What the host does beside the launches is done
again with a replay, see `_HostEffects`. All else that a launch depends on is compared before every
step, see `_Dependencies`: where it differs, some steps run as ever, then there are new captures.

Not captured: the optimizer step and what data-parallel ranks exchange. Where that is to overlap
with the last backward of a step, the last micro-batch is not, either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.batch import Batch
from fp8lm.comm import WireCounter
from fp8lm.comm.groups import ProcessGroups
from fp8lm.config import Config
from fp8lm.kernels.cuda_graph import CudaGraphs, GraphCapture, Replay
from fp8lm.layers.linear import GemmPath, Linear
from fp8lm.layers.main_grad import MainGrad
from fp8lm.layers.param import OperandCache, Param, QuantizedParam, named_params
from fp8lm.layers.quantizer import Quantizer
from fp8lm.model.gpt import GPTModel
from fp8lm.model.objectives import Objective
from fp8lm.parallel.pipeline import NoPipeline, backward, nothing
from fp8lm.runtime.errors import InputError

FIRST, FURTHER = "first", "further"
_ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_REGISTERS = "NCCL_GRAPH_REGISTER"


def reduces_in_backward(config: Config, num_replicas: int) -> bool:
    """Whether data-parallel ranks exchange gradients in the last backward of a step."""
    return num_replicas > 1 and config.parallel.overlap_grad_reduce


def check_cuda_graphs(config: Config, groups: ProcessGroups) -> None:
    """InputError where there is no micro-batch to capture in a step of `config`."""
    train, num_replicas = config.train, groups.dims.dp
    count = train.global_batch_size // (train.micro_batch_size * num_replicas)
    if count == 1 and reduces_in_backward(config, num_replicas):
        raise InputError(
            "train.enable_cuda_graph = true: the one micro-batch of a step exchanges gradients in "
            f"its backward between {num_replicas} replicas, which is not captured: set "
            "parallel.overlap_grad_reduce=false, or train.enable_cuda_graph=false"
        )


def check_nccl(groups: ProcessGroups, environment: Mapping[str, str]) -> None:
    """InputError where what tensor-parallel ranks exchange cannot be captured."""
    if groups.dims.tp == 1:
        return
    key, backend = "train.enable_cuda_graph = true", dist.get_backend(groups.tensor_parallel)
    if backend != "nccl":
        raise InputError(
            f"{key} with tensor parallelism captures NCCL's collectives, not those of {backend}: "
            "set train.enable_cuda_graph=false"
        )
    allocator = "".join(environment.get(name, "") for name in _ALLOCATORS)
    if "expandable_segments:True" in allocator and environment.get(_REGISTERS) != "0":
        raise InputError(
            f"{key} with expandable_segments:True in {_ALLOCATORS[0]}: NCCL would register memory "
            f"that is mapped elsewhere later; set {_REGISTERS}=0 in the environment"
        )


def cuda_graphs(device: torch.device) -> CudaGraphs:
    """What captures micro-batches on `device`, which is a GPU, or InputError."""
    if device.type != "cuda":
        raise InputError(
            "train.enable_cuda_graph = true needs a GPU, and this process computes without: set "
            "train.enable_cuda_graph=false"
        )
    return CudaGraphs(device)


class GraphedMicrobatches(NoPipeline):
    """One stage whose micro-batches are replayed after `warmup_steps` steps that are not.

    `counter` counts what the layers of `model` send. `last_is_eager`: the last micro-batch of every
    step is not replayed, since more than its launches happens in its backward.
    """

    def __init__(
        self,
        model: GPTModel,
        capture: GraphCapture,
        counter: WireCounter,
        *,
        warmup_steps: int = 3,
        last_is_eager: bool = False,
    ) -> None:
        super().__init__(model.forward_step)
        self.warmup_steps, self.last_is_eager = warmup_steps, last_is_eager
        self._capture, self._counter = capture, counter
        self._params = params = list(named_params(model).values())
        self._main_grads = [param.main_grad for param in params if param.spec.trainable]
        self._matrices = [param for param in params if isinstance(param, QuantizedParam)]
        self._linears = [module for module in model.modules() if isinstance(module, Linear)]
        self._eagerly = False
        self._captured: _Captured | None = None

    def train(
        self,
        microbatches: list[Batch],
        objective: Objective,
        before_last: Callable[[], None] = nothing,
        before_first: Callable[[], None] = nothing,
    ) -> list[Tensor]:
        """See `Executor`; InputError where a micro-batch cannot be captured."""
        captured = self._captured_for(microbatches[0], objective)
        captured.share.fill_(1.0 / len(microbatches))
        replays = not self._eagerly and captured.runs[FIRST] >= self.warmup_steps
        found = []
        for number, batch in enumerate(microbatches):
            kind, is_last = FURTHER if number else FIRST, number == len(microbatches) - 1
            if is_last:
                before_last()
            prepare = nothing if number else before_first
            # The first has made what the others read: they are replayed only where it is.
            replays = replays and captured.runs[kind] > 0 and not (is_last and self.last_is_eager)
            if replays:
                found.append(self._replay(captured, kind, batch, objective, prepare))
            else:
                work = partial(self._work, batch, objective, captured.share, prepare)
                found.append(self._capture.run(work))
                captured.runs[kind] += 1
        return [torch.stack(values).sum() for values in zip(*found, strict=True)]

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """See `Executor`."""
        self._eagerly = True
        try:
            yield
        finally:
            self._eagerly = False

    def _work(
        self, batch: Batch, objective: Objective, share: Tensor, prepare: Callable[[], None]
    ) -> list[Tensor]:
        prepare()
        return backward(self.forward(batch, objective), share)

    def _replay(
        self,
        captured: _Captured,
        kind: str,
        batch: Batch,
        objective: Objective,
        prepare: Callable[[], None],
    ) -> list[Tensor]:
        _copy_into(captured.inputs, batch)
        graph = captured.graphs.get(kind)
        if graph is None:
            work = partial(self._work, captured.inputs, objective, captured.share, prepare)
            graph = captured.graphs[kind] = self._capture_graph(work, captured.pool)
        else:
            graph.effects.repeat()
        graph.replay()
        return [result.clone() for result in graph.results]

    def _capture_graph(self, work: Callable[[], list[Tensor]], pool: Any) -> _Graph:
        empty = [grad for grad in self._main_grads if grad.is_zero]
        sent_before = self._counter.sent
        try:
            replay, results = self._capture.capture(work, pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InputError(
                f"train.enable_cuda_graph = true: a micro-batch cannot be captured ({error}): set "
                "train.enable_cuda_graph=false"
            ) from error
        effects = _HostEffects(
            [grad for grad in empty if not grad.is_zero],
            [(weight, weight.cache and replace(weight.cache)) for weight in self._matrices],
            {wire: sent - sent_before[wire] for wire, sent in self._counter.sent.items()},
            self._counter,
        )
        return _Graph(replay, results, effects)

    def _captured_for(self, batch: Batch, objective: Objective) -> _Captured:
        """The captures of such steps, none yet where they depend on something else than before."""
        depends_on = _Dependencies(
            objective,
            _shapes_of(batch),
            [(linear.path, linear.weight.quantizer) for linear in self._linears],
            [tensor.data_ptr() for param in self._params for tensor in _tensors_of(param)],
        )
        if self._captured is None or self._captured.depends_on != depends_on:
            self._captured = None  # frees the memory of the former
            inputs, share = _empty_like(batch), batch.loss_mask.new_ones(())
            self._captured = _Captured(depends_on, inputs, share, self._capture.pool())
        return self._captured


@dataclass
class _Dependencies:
    """What launches depend on and no tensor says: formats and memory, which may change.

    The formats of a layer are those of its `GemmPath` and its weight's `Quantizer`, which a guard
    of FP8 GEMMs exchanges.
    """

    objective: Objective
    shapes: dict[str, tuple[torch.Size, torch.dtype]]
    formats: list[tuple[GemmPath, Quantizer]]
    addresses: list[int]


@dataclass
class _HostEffects:
    """What a micro-batch changes on the host: sums begun, operands cached, bytes sent."""

    begun: list[MainGrad]
    operands: list[tuple[QuantizedParam, OperandCache | None]]
    sent: dict[str, int]
    counter: WireCounter

    def repeat(self) -> None:
        """Change it again."""
        for grad in self.begun:
            grad.mark_added()
        for weight, cache in self.operands:
            weight.cache = None if cache is None else replace(cache)
        for wire, num_bytes in self.sent.items():
            self.counter.add(wire, num_bytes)


@dataclass
class _Graph:
    replay: Replay
    results: list[Tensor]
    effects: _HostEffects


@dataclass
class _Captured:
    """Graphs by kind, and what they read; `runs` counts by kind what ran without one."""

    depends_on: _Dependencies
    inputs: Batch
    share: Tensor
    pool: Any
    graphs: dict[str, _Graph] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=lambda: {FIRST: 0, FURTHER: 0})


def _tensors_of(param: Param) -> list[Tensor]:
    held = [param.model_param, *([param.main_grad.value] if param.spec.trainable else [])]
    return [tensor for scaled in held for tensor in (scaled.payload, scaled.scale)]


def _inputs_of(batch: Batch) -> dict[str, Tensor]:
    """The tensors of `batch`, by field; TypeError for one whose shapes are its own."""
    if batch.documents is not None or batch.sequence_bounds is not None:
        raise TypeError("documents and preferences have other shapes in every micro-batch")
    given = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    return {name: value for name, value in given.items() if value is not None}


def _shapes_of(batch: Batch) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (x.shape, x.dtype) for name, x in _inputs_of(batch).items()}


def _empty_like(batch: Batch) -> Batch:
    empty: dict[str, Any] = {name: torch.empty_like(x) for name, x in _inputs_of(batch).items()}
    return Batch(**empty)


def _copy_into(inputs: Batch, batch: Batch) -> None:
    if _shapes_of(inputs) != _shapes_of(batch):
        raise ValueError("micro-batches of a step have one shape")
    targets = _inputs_of(inputs)
    for name, value in _inputs_of(batch).items():
        targets[name].copy_(value)
