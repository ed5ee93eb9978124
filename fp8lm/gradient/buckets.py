"""Bucketed reduction of gradients, overlapped with backward.

Buckets hold weights of one parameter group in the order in which backward completes them, last
layer first. In the backward of the last micro-batch a bucket is reduced as soon as autograd is done
with all of its weights: with one that is used twice (tied embeddings) after both uses, with one
that is not used when backward is over. All ranks reduce the buckets in the same order, those of all
groups in one sequence: ranks that wait for each other in different groups would wait for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.comm import Handle, MessageLayout, all_gather_uneven
from fp8lm.gradient.reduction import GradientReduction, sent_format
from fp8lm.layers.param import Param, by_group
from fp8lm.layers.shard_spec import LocalShards
from fp8lm.numerics import FP32, Format, Granularity, granularity_of
from fp8lm.scaled_tensor import ScaledTensor

UNDER_WAY = 2


@dataclass(frozen=True)
class ShardedReduction:
    """How the gradients of one parameter group are reduced; rank r of its group owns `rows[r]`."""

    reduction: GradientReduction
    rows: Sequence[LocalShards]


class GradientBuckets:
    """Reduces the gradients of `weights` to the ranks that own their rows.

    `reductions` are those of the weights' parameter groups by name, in one order on all ranks.
    `overlap`: reduce during the last backward, otherwise after it. At most two buckets are in
    flight at a time, which bounds the memory of their messages. `observer` is called with the
    name of a weight after its gradient was cast to be sent, and must not wait for the device.
    """

    def __init__(
        self,
        weights: dict[str, Param],
        reductions: Mapping[str, ShardedReduction],
        bucket_size: int,
        *,
        overlap: bool,
    ) -> None:
        self.weights, self.reductions = weights, reductions
        self.observer: Callable[[str, Tensor, ScaledTensor], None] | None = None
        self.buckets = _fill(weights, bucket_size)
        self._bucket_of = {name: i for i, names in enumerate(self.buckets) for name in names}
        self._missing: list[set[str]] = []
        self._num_started = 0
        self._under_way: deque[Handle[dict[str, Tensor]]] = deque()
        self._arrived: dict[str, Tensor] = {}
        if overlap:
            for name, weight in weights.items():
                weight.when_gradient_complete(self._complete, name)

    def enable_grad_sync(self) -> None:
        """Reduce gradients in the backward that follows, the last of the step."""
        self._missing = [set(names) for names in self.buckets]

    def finish(self) -> dict[str, ScaledTensor]:
        """Means over the replicas of this rank's rows (fp32), by weight."""
        while self._num_started < len(self.buckets):
            self._start()
        self._wait(at_most=0)
        gradients, self._arrived = self._arrived, {}
        self._missing, self._num_started = [], 0
        return {n: _fp32(gradients[n]) for n in self.weights if n in gradients}

    def finish_everywhere(self) -> dict[str, ScaledTensor]:
        """Means of all rows on every rank, in the format they were sent in, the same bits."""
        means = self.finish()
        gradients: dict[str, ScaledTensor] = {}
        for sharded in self.reductions.values():
            gradients |= self._gather(means, sharded)
        return {name: gradients[name] for name in self.weights}

    def finish_step(self, skipped: Tensor) -> None:
        """See `GradientReduction`."""
        for sharded in self.reductions.values():
            sharded.reduction.finish_step(skipped)

    def named_tensors(self) -> dict[str, Tensor]:
        """See `GradientReduction`."""
        return {
            name: tensor
            for sharded in self.reductions.values()
            for name, tensor in sharded.reduction.named_tensors().items()
        }

    def _gather(
        self, means: Mapping[str, ScaledTensor], sharded: ShardedReduction
    ) -> dict[str, ScaledTensor]:
        reduction, rank = sharded.reduction, sharded.reduction.group.rank()
        own = []
        for name, mean in means.items():
            if name in sharded.rows[rank]:
                fmt, granularity = self._sent_as(name)
                quantized = reduction.kernels.quantize(mean.payload, fmt, granularity=granularity)
                own.append(quantized)
        layouts = [self._layout(rows) for rows in sharded.rows]
        device = next(iter(self.weights.values())).model_param.device
        sizes = [layout.nbytes for layout in layouts]
        buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        if own:
            layouts[rank].pack(own, buffer.split(sizes)[rank])
        messages = all_gather_uneven(buffer, sizes, reduction.group, reduction.wire).wait()
        gradients: dict[str, ScaledTensor] = {}
        for rows, layout, message in zip(sharded.rows, layouts, messages.split(sizes), strict=True):
            names = [name for name in self.weights if name in rows]
            gradients.update(zip(names, layout.views(message), strict=True))
        return gradients

    def _layout(self, rows: LocalShards) -> MessageLayout:
        parts, granularities = [], []
        for name, weight in self.weights.items():
            if name in rows:
                start, stop = rows[name]
                fmt, granularity = self._sent_as(name)
                parts.append(((stop - start, *weight.spec.local_shape[1:]), fmt))
                granularities.append(granularity)
        return MessageLayout(tuple(parts), tuple(granularities))

    def _reduction_of(self, name: str) -> ShardedReduction:
        return self.reductions[self.weights[name].spec.group]

    def _sent_as(self, name: str) -> tuple[Format, Granularity]:
        spec, wire = self.weights[name].spec, self._reduction_of(name).reduction.wire
        fmt = sent_format(spec.grad_format, wire, keep_high_precision=spec.keep_high_precision)
        return fmt, granularity_of(fmt, spec.local_shape)

    def _complete(self, name: str) -> None:
        """Backward has passed all uses of weight `name`: start the buckets that are complete."""
        if self._missing:
            self._missing[self._bucket_of[name]].discard(name)
            while self._num_started < len(self.buckets) and not self._next_missing():
                self._start()

    def _next_missing(self) -> set[str]:
        return self._missing[self._num_started]

    def _start(self) -> None:
        self._wait(at_most=UNDER_WAY - 1)
        names = self.buckets[self._num_started]
        sent, sharded = {name: self._sent(name) for name in names}, self._reduction_of(names[0])
        self._under_way.append(sharded.reduction.start(sent, sharded.rows))
        self._num_started += 1

    def _wait(self, at_most: int) -> None:
        while len(self._under_way) > at_most:
            self._arrived.update(self._under_way.popleft().wait())

    def _sent(self, name: str) -> ScaledTensor:
        """The whole gradient in the format it is sent in: its scale does not depend on sharding."""
        accumulator = self.weights[name].main_grad
        kernels = self._reduction_of(name).reduction.kernels
        accumulator.zero_if_unused()  # a weight that no micro-batch used
        gradient, (fmt, _) = accumulator.value, self._sent_as(name)
        if fmt == gradient.format:
            return gradient
        exact = kernels.dequantize(gradient)
        sent = kernels.quantize(exact, fmt)
        if self.observer is not None:
            self.observer(name, exact, sent)
        return sent


def _fill(weights: dict[str, Param], bucket_size: int) -> list[list[str]]:
    """Names in buckets of about `bucket_size` parameters, by when backward completes the last."""
    completed = {name: number for number, name in enumerate(reversed(weights))}
    buckets = [b for members in by_group(weights).values() for b in _cut(members, bucket_size)]
    return sorted(buckets, key=lambda names: completed[names[-1]])


def _cut(weights: dict[str, Param], bucket_size: int) -> list[list[str]]:
    buckets: list[list[str]] = [[]]
    size = 0
    for name, weight in reversed(weights.items()):
        if size >= bucket_size:
            buckets.append([])
            size = 0
        buckets[-1].append(name)
        size += weight.spec.numel
    return buckets


def _fp32(values: Tensor) -> ScaledTensor:
    return ScaledTensor(values, torch.ones((), device=values.device), FP32)
