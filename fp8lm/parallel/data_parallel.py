"""Replicas of a model that see different data: what they exchange in a step (FP8-LM, 2.1 and 2.3).

    reduce     every rank's gradients to the rank that owns the rows        (`fp8lm.gradient`)
    gather     the owners' new weights to every rank, as the bytes they are

`OneReplica` exchanges nothing. `ZeroReplicas` divides optimizer states over the ranks (ZeRO 1 and
gradients as in ZeRO 2: their sums exist on the owner only); `PlainReplicas` gives every rank all
of them. Bytes a rank sends in a step for N one-byte parameters on d ranks, padding aside:

    reduce (d-1)/d N        gather (d-1)/d N        plain: 2 (d-1)/d N and no gather
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from fp8lm.gradient.buckets import GradientBuckets
from fp8lm.layers.linear import Linear
from fp8lm.layers.norm import LayerNorm, RMSNorm
from fp8lm.layers.weight import Weight, named_weights
from fp8lm.parallel.ownership import Tensor2D
from fp8lm.parallel.weight_slabs import WeightSlabs
from fp8lm.scaled_tensor import ScaledTensor

Rows = tuple[int, int]


class OneReplica:
    """Owns everything, exchanges nothing; `owned` names each weight's rows (first dimension)."""

    counts_in_norm = True
    padding = 0  # bytes held beside the weights

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

    def wait_for_weights(self) -> None:
        """Return when the last step's weights are there; a forward waits by itself."""

    def named_tensors(self) -> dict[str, Tensor]:
        """What the reduction remembers from step to step, for a checkpoint."""
        return {}

    def finish_step(self, skipped: Tensor) -> None:
        """Bring the owners' new weights to every rank; `skipped` (0-d bool): there are none."""


class SeveralReplicas(OneReplica):
    """What ZeRO and plain replicas have in common: gradients leave through `buckets`."""

    def __init__(self, weights: dict[str, Weight], buckets: GradientBuckets) -> None:
        super().__init__(weights)
        self._buckets = buckets

    def before_last_microbatch(self) -> None:
        """See `OneReplica`."""
        self._buckets.arm()

    def named_tensors(self) -> dict[str, Tensor]:
        """See `OneReplica`."""
        return self._buckets.reduction.named_tensors()

    def finish_step(self, skipped: Tensor) -> None:
        """See `OneReplica`."""
        self._buckets.reduction.finish_step(skipped)


class PlainReplicas(SeveralReplicas):
    """Every rank holds and steps everything, with the same gradients."""

    def __init__(self, weights: dict[str, Weight], buckets: GradientBuckets, rank: int) -> None:
        super().__init__(weights, buckets)
        self.counts_in_norm = rank == 0

    def reduce(self) -> dict[str, ScaledTensor]:
        """See `OneReplica`: here all rows."""
        return self._buckets.finish_everywhere()


class ZeroReplicas(SeveralReplicas):
    """Every rank steps the rows it owns; compute copies are views of gathered buffers.

    `slabs` divide the weights, in the order in which forward needs them.
    """

    def __init__(
        self, weights: dict[str, Weight], slabs: list[WeightSlabs], buckets: GradientBuckets
    ) -> None:
        super().__init__(weights, buckets)
        self._slabs, self.overlaps = slabs, False
        self.owned = {name: rows for part in slabs for name, rows in part.owned.items()}
        self.padding = sum(part.padding for part in slabs)

    def reduce(self) -> dict[str, ScaledTensor]:
        """See `OneReplica`."""
        return self._buckets.finish()

    def finish_step(self, skipped: Tensor) -> None:
        """See `OneReplica`."""
        super().finish_step(skipped)
        for part in self._slabs:
            part.start_gather()
        if not self.overlaps:
            self.wait_for_weights()

    def wait_for_weights(self) -> None:
        """See `OneReplica`."""
        for part in self._slabs:
            part.wait()

    def overlap_gather(self, model: nn.Module) -> None:
        """From now on a module of `model` waits for its own weights only, in its next forward."""
        self.overlaps = True
        here = named_weights(model)
        part_of = {name: part for part in self._slabs for name in part.names if name in here}
        waited_for = set()
        for path, module in model.named_modules():
            if isinstance(module, Linear | LayerNorm | RMSNorm):
                names = [f"{path}.{name}" for name in named_weights(module)]
                module.register_forward_pre_hook(_waiting(part_of[name] for name in names))
                waited_for.update(names)
        # Tables are no modules that are called.
        model.register_forward_pre_hook(
            _waiting(part for name, part in part_of.items() if name not in waited_for)
        )


def _waiting(parts: Iterable[WeightSlabs]) -> Callable[..., None]:
    parts = list(dict.fromkeys(parts))

    def wait(*_: object) -> None:
        for part in parts:
            part.wait()

    return wait


def tensors_of(weights: dict[str, Weight]) -> list[Tensor2D]:
    """The compute copies of `weights` as ownership places them."""
    made = []
    for name, weight in weights.items():
        payload = weight.compute.payload
        rows = payload.shape[0]
        made.append(Tensor2D(name, rows, payload.numel() // rows, payload.itemsize))
    return made


def in_parts(weights: dict[str, Weight], size: int | None) -> list[dict[str, Weight]]:
    """`weights` in parts of about `size` parameters, in order; None: all in one."""
    parts: list[dict[str, Weight]] = [{}]
    count = 0
    for name, weight in weights.items():
        if size is not None and count >= size:
            parts.append({})
            count = 0
        parts[-1][name] = weight
        count += weight.spec.numel
    return parts
