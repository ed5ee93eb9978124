"""Bucketed reduction of gradients, overlapped with backward.

Buckets hold weights in the order in which backward completes them, last layer first. In the
backward of the last micro-batch a bucket is reduced as soon as autograd is done with all of its
weights: with one that is used twice (tied embeddings) after both uses, with one that is not used
when backward is over. All ranks reduce the buckets in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from fp8lm.comm import Handle, MessageLayout, all_gather_uneven
from fp8lm.gradient.reduction import GradientReduction, Rows, sent_format
from fp8lm.layers.param import Param
from fp8lm.numerics import FP32, Format
from fp8lm.scaled_tensor import ScaledTensor

UNDER_WAY = 2


class GradientBuckets:
    """Reduces the gradients of `weights` to the ranks that own their `rows` (one map per rank).

    `overlap`: reduce during the last backward, otherwise after it. At most two buckets are in
    flight at a time, which bounds the memory of their messages.
    """

    def __init__(
        self,
        weights: dict[str, Param],
        rows: Sequence[Rows],
        reduction: GradientReduction,
        bucket_size: int,
        *,
        overlap: bool,
    ) -> None:
        self.weights, self.rows, self.reduction = weights, rows, reduction
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
        group, wire, kernels = (
            self.reduction.group,
            self.reduction.wire,
            self.reduction.kernels,
        )
        own = [
            kernels.quantize(mean.payload, self._sent_format(name))
            for name, mean in self.finish().items()
        ]
        layouts = [self._layout(rows) for rows in self.rows]
        device = next(iter(self.weights.values())).model_param.device
        sizes = [layout.nbytes for layout in layouts]
        buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        if own:
            layouts[group.rank()].pack(own, buffer.split(sizes)[group.rank()])
        gradients: dict[str, ScaledTensor] = {}
        messages = all_gather_uneven(buffer, sizes, group, wire).wait().split(sizes)
        for rows, layout, message in zip(self.rows, layouts, messages, strict=True):
            names = [name for name in self.weights if name in rows]
            gradients.update(zip(names, layout.views(message), strict=True))
        return {name: gradients[name] for name in self.weights}

    def _layout(self, rows: Rows) -> MessageLayout:
        parts = []
        for name, weight in self.weights.items():
            if name in rows:
                start, stop = rows[name]
                shape = (stop - start, *weight.spec.local_shape[1:])
                parts.append((shape, self._sent_format(name)))
        return MessageLayout(tuple(parts))

    def _sent_format(self, name: str) -> Format:
        spec = self.weights[name].spec
        return sent_format(
            spec.grad_format, self.reduction.wire, keep_high_precision=spec.keep_high_precision
        )

    def _complete(self, name: str) -> None:
        """All uses of a weight are behind the backward that runs: start the buckets that can go."""
        if self._missing:
            self._missing[self._bucket_of[name]].discard(name)
            while self._num_started < len(self.buckets) and not self._next_missing():
                self._start()

    def _next_missing(self) -> set[str]:
        return self._missing[self._num_started]

    def _start(self) -> None:
        self._wait(at_most=UNDER_WAY - 1)
        sent = {name: self._sent(name) for name in self.buckets[self._num_started]}
        self._under_way.append(self.reduction.start(sent, self.rows))
        self._num_started += 1

    def _wait(self, at_most: int) -> None:
        while len(self._under_way) > at_most:
            self._arrived.update(self._under_way.popleft().wait())

    def _sent(self, name: str) -> ScaledTensor:
        """The whole gradient in the format it is sent in: its scale does not depend on sharding."""
        accumulator, kernels = self.weights[name].main_grad, self.reduction.kernels
        accumulator.zero_if_unused()  # a weight that no micro-batch used
        gradient, fmt = accumulator.value, self._sent_format(name)
        if fmt == gradient.format:
            return gradient
        return kernels.quantize(kernels.dequantize(gradient), fmt)


def _fill(weights: dict[str, Param], bucket_size: int) -> list[list[str]]:
    """Names in buckets of about `bucket_size` parameters, last weight first."""
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
