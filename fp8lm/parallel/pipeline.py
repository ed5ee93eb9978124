"""Forward and backward of all micro-batches: on one stage, or by a pipeline schedule.

(FP8-LM, arXiv 2310.18313, section 2.3.)

A chunk is any function (h, batch) -> h: `h` are the hidden states of the previous chunk (None for
the first); the last chunk returns the model's output, from which the objective computes the loss.
Activations and gradients are sent in the order of the schedule, over separate groups (see
`PipelineGroups`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fp8lm.batch import Batch
from fp8lm.comm.groups import PipelineGroups
from fp8lm.comm.handles import Handle
from fp8lm.comm.p2p import PipelineP2P
from fp8lm.layers.weight_grad_store import WeightGradStore
from fp8lm.model.objectives import Objective
from fp8lm.parallel.pipeline_schedule import (
    Action,
    Schedule,
    early_receives,
    forwards,
    received,
)
from fp8lm.parallel.stages import TiedEmbeddingSync

Chunk = Callable[[Tensor | None, Batch], Tensor]
Head = Callable[[Tensor, Batch], Tensor]  # of the model's output
Last = Callable[[Tensor, Batch], list[Tensor]]  # of which the first is differentiated


def nothing() -> None:
    """Nothing to do."""


class Executor(Protocol):
    """Runs the model on micro-batches, whatever number of stages it has."""

    num_stages: int

    def train(
        self,
        microbatches: list[Batch],
        objective: Objective,
        before_last: Callable[[], None] = nothing,
        before_first: Callable[[], None] = nothing,
    ) -> list[Tensor]:
        """Forward and backward of all; the means of `Objective.loss_and_metrics`.

        0-d fp32, zero on all stages but the last.
        `before_first` is called before the first forward, and computes on the device only.
        `before_last` is called before the last backward if that completes the gradients.
        """

    def without_graphs(self) -> AbstractContextManager[None]:
        """Within, all operations of a micro-batch are called, where observers see them."""

    def evaluate(self, microbatches: Iterable[Batch], objective: Objective) -> list[Tensor]:
        """The same means without backward."""

    def map(self, microbatches: Iterable[Batch], head: Head) -> Iterable[Tensor]:
        """`head` of every micro-batch's output, without backward; none but on the last stage."""


def backward(losses: Sequence[Tensor], share: Tensor | float) -> list[Tensor]:
    """Backward of the first; losses and metrics of a micro-batch that is a `share` of all (fp32).

    A product has the same bits whether `share` is on the device or the host; a quotient has not.
    """
    loss, *metrics = (value * share for value in losses)
    loss.backward()
    return [loss.detach(), *metrics]


class NoPipeline:
    """One stage, which is the whole model: micro-batches one after the other."""

    num_stages = 1

    def __init__(self, forward_step: Chunk) -> None:
        self._forward_step = forward_step

    def train(
        self,
        microbatches: list[Batch],
        objective: Objective,
        before_last: Callable[[], None] = nothing,
        before_first: Callable[[], None] = nothing,
    ) -> list[Tensor]:
        """See `Executor`."""
        found = []
        before_first()
        for number, batch in enumerate(microbatches, start=1):
            if number == len(microbatches):
                before_last()
            found.append(backward(self.forward(batch, objective), 1.0 / len(microbatches)))
        return [torch.stack(values).sum() for values in zip(*found, strict=True)]

    def forward(self, batch: Batch, objective: Objective) -> list[Tensor]:
        """`Objective.loss_and_metrics` of one micro-batch."""
        return objective.loss_and_metrics(self._forward_step(None, batch), batch)

    def without_graphs(self) -> AbstractContextManager[None]:
        """See `Executor`; there are none."""
        return nullcontext()

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Batch], objective: Objective) -> list[Tensor]:
        """See `Executor`; holds one micro-batch at a time."""
        found = [self.forward(batch, objective) for batch in microbatches]
        return [torch.stack(values).mean() for values in zip(*found, strict=True)]

    def map(self, microbatches: Iterable[Batch], head: Head) -> Iterator[Tensor]:
        """See `Executor`; one micro-batch at a time, as they are asked for."""
        for batch in microbatches:
            with torch.no_grad():
                found = head(self._forward_step(None, batch), batch)
            yield found


class Pipeline:
    """Runs this rank's `chunks` of the model by a schedule.

    `schedule(m)` gives the order for m micro-batches. `wgrad_store` collects weight gradients if
    the schedule computes them separately. `tied` syncs the gradients of tied embeddings, on the
    first and the last stage.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        schedule: Callable[[int], Schedule],
        groups: PipelineGroups,
        wire: PipelineP2P,
        device: torch.device,
        wgrad_store: WeightGradStore,
        tied: TiedEmbeddingSync | None = None,
    ) -> None:
        self.chunks, self.schedule, self.groups = chunks, schedule, groups
        self.wire, self.device, self.wgrad_store = wire, device, wgrad_store
        self.stage, self.num_stages = groups.pp_forward.rank(), groups.pp_forward.size()
        self.tied = tied
        self.most_in_flight = 0
        self._most_messages = self.num_stages
        # Of an output only its graph edge is held: its values have been sent.
        self._held: dict[tuple[int, int], tuple[Tensor | None, GradientEdge | None]] = {}
        # Messages that may not have arrived yet: activations and gradients.
        self._sending: dict[str, deque[Handle[None]]] = {"F": deque(), "B": deque()}
        self._results: list[list[Tensor]] = []  # of the last chunk, for every micro-batch
        # Messages that were asked for, by the action that needs them.
        self._arriving: dict[Action, Handle[Tensor]] = {}
        self._plans: dict[tuple[int, bool], tuple[Schedule, frozenset[int]]] = {}

    def without_graphs(self) -> AbstractContextManager[None]:
        """See `Executor`; there are none."""
        return nullcontext()

    @property
    def has_loss(self) -> bool:
        """Whether this is the last stage."""
        return self.stage == self.num_stages - 1

    def train(
        self,
        microbatches: list[Batch],
        objective: Objective,
        before_last: Callable[[], None] = nothing,
        before_first: Callable[[], None] = nothing,
    ) -> list[Tensor]:
        """See `Executor`."""
        before_first()
        losses = _losses_of(objective, len(microbatches))
        schedule, early = self._planned(len(microbatches), training=True)
        actions = schedule.stages[self.stage]
        self.most_in_flight = 0
        self._most_messages = max(schedule.in_flight)
        last = next(i for i in reversed(range(len(actions))) if actions[i].kind in "BI")
        for number, action in self._in_turn(schedule, early):
            complete = len(self.chunks) == 1 and not schedule.splits_backward and not self.tied
            if number == last and complete:
                before_last()
            self._do(action, microbatches, losses, schedule.splits_backward)
        if self.tied is not None:
            self.tied.sum_gradients()
        return self._sums(objective)

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Batch], objective: Objective) -> list[Tensor]:
        """See `Executor`."""
        microbatches = list(microbatches)
        self._run_forwards(microbatches, _losses_of(objective, len(microbatches)))
        return self._sums(objective)

    @torch.no_grad()
    def map(self, microbatches: Iterable[Batch], head: Head) -> list[Tensor]:
        """See `Executor`."""
        self._run_forwards(list(microbatches), lambda output, batch: [head(output, batch)])
        return [found for (found,) in self._take_results()]

    def _run_forwards(self, microbatches: list[Batch], last: Last) -> None:
        self._most_messages = self.num_stages
        for _, action in self._in_turn(*self._planned(len(microbatches), training=False)):
            self._forward(action, microbatches[action.microbatch], last)

    def _planned(self, num_microbatches: int, *, training: bool) -> tuple[Schedule, frozenset[int]]:
        """The schedule, and which of this stage's actions ask for their message one ahead."""
        key = num_microbatches, training
        if key not in self._plans:
            if training:
                schedule = self.schedule(num_microbatches)
            else:
                actions = forwards(self.num_stages, num_microbatches, len(self.chunks))
                schedule = Schedule((tuple(actions),) * self.num_stages, len(self.chunks))
            self._plans[key] = schedule, early_receives(schedule)[self.stage]
        return self._plans[key]

    def _in_turn(self, schedule: Schedule, early: frozenset[int]) -> Iterator[tuple[int, Action]]:
        """This stage's actions with their numbers, each after its message has been asked for.

        NCCL starts to receive when all is done that was launched before: what is asked for one
        action ahead arrives beside it.
        """
        actions = schedule.stages[self.stage]
        for number, action in enumerate(actions):
            if number not in early:
                self._ask_for(schedule, action)
            if number + 1 in early:
                self._ask_for(schedule, actions[number + 1])
            yield number, action

    def _ask_for(self, schedule: Schedule, action: Action) -> None:
        message = received(schedule, self.stage, action)
        if message is not None:
            source = message[1] % self.num_stages
            channel = self._channel(source, self.stage)
            self._arriving[action] = self.wire.receive(source, channel, self.device)

    def _do(self, action: Action, microbatches: list[Batch], last: Last, splits: bool) -> None:
        if action.kind == "F":
            self._forward(action, microbatches[action.microbatch], last)
            held = len(self._held) + len(self.wgrad_store)
            self.most_in_flight = max(self.most_in_flight, held)
        elif action.kind == "W":
            self.wgrad_store.compute(action.microbatch)
        else:
            with self.wgrad_store.deferring(action.microbatch if splits else None):
                self._backward(action)

    def _forward(self, action: Action, batch: Batch, last: Last) -> None:
        """Run a micro-batch through a chunk, and what the last one gives through `last`."""
        virtual = self._virtual(action)
        hidden = None
        if virtual:
            hidden = self._arriving.pop(action).wait()
            hidden.requires_grad_(torch.is_grad_enabled())
        output = self.chunks[action.chunk](hidden, batch)
        if virtual < self._last_virtual:
            self._send(output, (self.stage + 1) % self.num_stages, self._sending["F"])
        else:
            output, *more = last(output, batch)
            self._results.append([output.detach(), *more])
        if torch.is_grad_enabled():
            # A first chunk whose weights are all frozen has no backward.
            edge = get_gradient_edge(output) if output.requires_grad else None
            self._held[action.microbatch, action.chunk] = hidden, edge

    def _backward(self, action: Action) -> None:
        virtual = self._virtual(action)
        hidden, output = self._held.pop((action.microbatch, action.chunk))
        gradient = None
        if virtual < self._last_virtual:
            gradient = self._arriving.pop(action).wait()
        if output is not None:
            torch.autograd.backward(output, gradient)
        if hidden is not None:
            if hidden.grad is None:
                raise RuntimeError("the loss does not depend on what the stage before has sent")
            self._send(hidden.grad, (self.stage - 1) % self.num_stages, self._sending["B"])

    def _send(self, x: Tensor, to: int, sending: deque[Handle[None]]) -> None:
        """Send without waiting, except for a message so old that it has been received.

        A stage that has as many micro-batches in flight as the schedule allows does nothing more
        before it has received the gradient of the first, and its neighbour likewise. Without
        gradients, as many as there are stages go through a chunk before the next.
        """
        sending.append(self.wire.send(x, to, self._channel(self.stage, to)))
        while len(sending) > self._most_messages:
            sending.popleft().wait()

    def _sums(self, objective: Objective) -> list[Tensor]:
        """Of the losses and metrics of all micro-batches."""
        found = self._take_results()
        if not found:
            return [torch.zeros((), device=self.device) for _ in ("loss", *objective.metrics)]
        return [torch.stack(values).sum() for values in zip(*found, strict=True)]

    def _take_results(self) -> list[list[Tensor]]:
        """What the last chunk gave, once all messages have been sent."""
        for sending in self._sending.values():
            while sending:
                sending.popleft().wait()
        found, self._results = self._results, []
        return found

    def _channel(self, source: int, to: int) -> dist.ProcessGroup:
        return self.groups.pp_forward if source < to else self.groups.pp_backward

    def _virtual(self, action: Action) -> int:
        return action.chunk * self.num_stages + self.stage

    @property
    def _last_virtual(self) -> int:
        return len(self.chunks) * self.num_stages - 1


def _losses_of(objective: Objective, count: int) -> Last:
    """Losses and metrics of one of `count` micro-batches, as shares of the mean."""

    def losses(output: Tensor, batch: Batch) -> list[Tensor]:
        return [value * (1.0 / count) for value in objective.loss_and_metrics(output, batch)]

    return losses
