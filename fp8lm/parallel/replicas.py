"""Replicas of a model that see different data: what they exchange in a step (FP8-LM, 2.1 and 2.3).

    reduce     every rank's gradients to the rank that owns the rows        (`fp8lm.gradient`)
    gather     the owners' new weights to every rank, as the bytes they are

`OneReplica` exchanges nothing. `ZeroReplicas` divides optimizer states over the ranks (ZeRO 1 and
gradients as in ZeRO 2: their sums exist on the owner only); `PlainReplicas` gives every rank all
of them. Bytes a rank sends in a step for N one-byte parameters on d ranks, padding aside:

    reduce (d-1)/d N        gather (d-1)/d N        plain: 2 (d-1)/d N and no gather
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm import Wire, all_gather_bytes
from fp8lm.gradient.buckets import GradientBuckets
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.layers.weight import Weight
from fp8lm.parallel.ownership import Ownership, Tensor2D
from fp8lm.scaled_tensor import ScaledTensor

Rows = tuple[int, int]


class OneReplica:
    """Owns everything, exchanges nothing; `owned` names each weight's rows (first dimension)."""

    counts_in_norm = True

    def __init__(self, weights: dict[str, Weight]) -> None:
        self.weights = weights
        self.owned: dict[str, Rows] = {
            name: (0, weight.spec.local_shape[0]) for name, weight in weights.items()
        }

    def before_last_microbatch(self) -> None:
        """Gradients are complete after the backward that follows."""

    def reduce(self) -> dict[str, ScaledTensor]:
        """Mean over the replicas of the owned rows' gradients, by weight."""
        for weight in self.weights.values():
            weight.grad.settle()  # a weight that no micro-batch used
        return {name: weight.grad.value for name, weight in self.weights.items()}

    def named_tensors(self) -> dict[str, Tensor]:
        """What the reduction remembers from step to step, for a checkpoint."""
        return {}

    def finish_step(self, skipped: Tensor) -> None:
        """Bring the owners' new weights to every rank; `skipped` (0-d bool): there are none."""


class PlainReplicas(OneReplica):
    """Every rank holds and steps everything, with the same gradients."""

    def __init__(self, weights: dict[str, Weight], buckets: GradientBuckets, rank: int) -> None:
        super().__init__(weights)
        self.counts_in_norm = rank == 0
        self._buckets = buckets

    def before_last_microbatch(self) -> None:
        """See `OneReplica`."""
        self._buckets.arm()

    def reduce(self) -> dict[str, ScaledTensor]:
        """See `OneReplica`: here all rows."""
        return self._buckets.finish_everywhere()

    def named_tensors(self) -> dict[str, Tensor]:
        """See `OneReplica`."""
        return self._buckets.reduction.named_tensors()

    def finish_step(self, skipped: Tensor) -> None:
        """See `OneReplica`: every rank has them already."""
        self._buckets.reduction.finish_step(skipped)


class ZeroReplicas(OneReplica):
    """Every rank steps the rows it owns; compute copies are views of one gathered buffer."""

    def __init__(
        self,
        weights: dict[str, Weight],
        ownership: Ownership,
        buckets: GradientBuckets,
        group: dist.ProcessGroup,
        wire: Wire,
        kernels: ReferenceKernels,
    ) -> None:
        super().__init__(weights)
        self.owned = dict(ownership.rows[group.rank()])
        self._buckets, self._group, self._wire, self._kernels = buckets, group, wire, kernels
        self._rows = ownership.rows
        device = next(iter(weights.values())).compute.device
        shape = (ownership.num_ranks, ownership.slab_bytes)
        self._slabs = torch.zeros(shape, dtype=torch.uint8, device=device)
        for name, weight in weights.items():
            start, payload = ownership.start[name], weight.compute.payload
            view = self._slabs.view(-1)[start : start + payload.nbytes]
            view = view.view(payload.dtype).view(payload.shape)
            weight.rebind(view.copy_(payload))

    def before_last_microbatch(self) -> None:
        """See `OneReplica`."""
        self._buckets.arm()

    def reduce(self) -> dict[str, ScaledTensor]:
        """See `OneReplica`."""
        return self._buckets.finish()

    def named_tensors(self) -> dict[str, Tensor]:
        """See `OneReplica`."""
        return self._buckets.reduction.named_tensors()

    def finish_step(self, skipped: Tensor) -> None:
        """See `OneReplica`. Scales do not travel: every rank computes them from shared amaxes."""
        self._buckets.reduction.finish_step(skipped)
        if self._wire.precision == "bf16":
            self._gather_values()
            return
        own = self._slabs[self._group.rank()]
        all_gather_bytes(own, self._group, self._wire, out=self._slabs).wait()

    def _gather_values(self) -> None:
        """The same weights in two bytes each, exact for FP8 and BF16, cast again on arrival."""
        dtype = torch.bfloat16
        sizes = [self._num_values(own) for own in self._rows]
        message = torch.zeros(max(sizes), dtype=dtype, device=self._slabs.device)
        own = [self._part(name, rows) for name, rows in self.owned.items()]
        if own:
            values = [part.dequantize(self._kernels, dtype).reshape(-1) for part in own]
            message[: sizes[self._group.rank()]] = torch.cat(values)
        received = all_gather_bytes(message.view(torch.uint8), self._group, self._wire).wait()
        for rank, values in enumerate(received.view(dtype)):
            if rank != self._group.rank():
                self._take(values, self._rows[rank])

    def _take(self, values: Tensor, rows: dict[str, Rows]) -> None:
        start = 0
        for name, span in rows.items():
            part = self._part(name, span)
            stop = start + part.payload.numel()
            cast = self._kernels.cast(values[start:stop], part.scale, part.format)
            part.payload.copy_(cast.view(part.shape))
            start = stop

    def _part(self, name: str, rows: Rows) -> ScaledTensor:
        return self.weights[name].compute.rows(*rows)

    def _num_values(self, rows: dict[str, Rows]) -> int:
        return sum(self._part(name, span).payload.numel() for name, span in rows.items())


def tensors_of(weights: dict[str, Weight]) -> list[Tensor2D]:
    """The compute copies of `weights` as ownership places them."""
    made = []
    for name, weight in weights.items():
        payload = weight.compute.payload
        made.append(Tensor2D(name, payload.shape[0], payload.nbytes // payload.shape[0]))
    return made
