"""Data parallelism: gradients reduced, parameters gathered (FP8-LM, sections 2.1 and 2.3).

    reduce     gradients to the rank that owns their rows                   (`fp8lm.gradient`)
    gather     the owners' new parameters to all ranks, payloads as they are stored

`NoDataParallel` is a single replica. `ZeroDataParallel` shards optimizer states (ZeRO stage 1) and
reduced gradients (stage 2); with `DistributedDataParallel` every rank holds all of them. Bytes sent
by a rank in a step for N one-byte parameters on d ranks, without padding:

    reduce (d-1)/d N        gather (d-1)/d N        plain: 2 (d-1)/d N and no gather
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from fp8lm.comm.param_groups import ParamGroup
from fp8lm.gradient.buckets import GradientBuckets
from fp8lm.layers.linear import Linear
from fp8lm.layers.norm import LayerNorm, RMSNorm
from fp8lm.layers.param import Param, named_params
from fp8lm.parallel.param_buffer import ParamBuffer
from fp8lm.scaled_tensor import ScaledTensor

Rows = tuple[int, int]


class NoDataParallel:
    """One replica; `local_shards` are the rows (first dimension) of each parameter it updates."""

    padding = 0  # bytes held beside the weights

    def __init__(self, weights: dict[str, Param]) -> None:
        self.weights = weights
        self.local_shards: dict[str, Rows] = {
            name: (0, weight.spec.local_shape[0]) for name, weight in weights.items()
        }

    def is_norm_owner(self, name: str) -> bool:
        """Whether the gradient of parameter `name` that `reduce` returns counts in the norm here.

        Of what several replicas return, one counts.
        """
        return True

    def enable_grad_sync(self) -> None:
        """Gradients are complete after the backward that follows."""

    def reduce(self) -> dict[str, ScaledTensor]:
        """Mean over the replicas of the owned rows' gradients, by weight."""
        for weight in self.weights.values():
            weight.main_grad.zero_if_unused()  # a weight that no micro-batch used
        return {name: weight.main_grad.value for name, weight in self.weights.items()}

    def finish_param_sync(self) -> None:
        """Return when the last step's weights are there; a forward waits by itself."""

    def named_tensors(self) -> dict[str, Tensor]:
        """What the reduction remembers from step to step, for a checkpoint."""
        return {}

    def start_param_sync(self, skipped: Tensor) -> None:
        """Bring the owners' new weights to every rank; `skipped` (0-d bool): there are none."""


class BucketedDataParallel(NoDataParallel):
    """Common part of ZeRO and DDP: gradients are reduced in `buckets`."""

    def __init__(self, weights: dict[str, Param], buckets: GradientBuckets) -> None:
        super().__init__(weights)
        self.buckets = buckets

    def enable_grad_sync(self) -> None:
        """See `NoDataParallel`."""
        self.buckets.enable_grad_sync()

    def named_tensors(self) -> dict[str, Tensor]:
        """See `NoDataParallel`."""
        return self.buckets.named_tensors()

    def start_param_sync(self, skipped: Tensor) -> None:
        """See `NoDataParallel`."""
        self.buckets.finish_step(skipped)


class DistributedDataParallel(BucketedDataParallel):
    """Every rank holds all optimizer states and applies the same update."""

    def __init__(
        self,
        weights: dict[str, Param],
        buckets: GradientBuckets,
        groups: Mapping[str, ParamGroup],
    ) -> None:
        super().__init__(weights, buckets)
        self._groups = groups

    def is_norm_owner(self, name: str) -> bool:
        """See `NoDataParallel`: here the first replica's."""
        return self._groups[self.weights[name].spec.group].is_first_replica

    def reduce(self) -> dict[str, ScaledTensor]:
        """See `NoDataParallel`: here all rows."""
        return self.buckets.finish_everywhere()


class ZeroDataParallel(BucketedDataParallel):
    """Every rank updates its rows; model parameters are views of all-gathered buffers.

    `buffers` divide the weights, in the order in which forward needs them.
    """

    def __init__(
        self, weights: dict[str, Param], buffers: list[ParamBuffer], buckets: GradientBuckets
    ) -> None:
        super().__init__(weights, buckets)
        self._buffers, self.overlaps = buffers, False
        self.local_shards = {
            name: rows for part in buffers for name, rows in part.local_shards.items()
        }
        self.padding = sum(part.padding for part in buffers)

    def reduce(self) -> dict[str, ScaledTensor]:
        """See `NoDataParallel`."""
        return self.buckets.finish()

    def start_param_sync(self, skipped: Tensor) -> None:
        """See `NoDataParallel`."""
        super().start_param_sync(skipped)
        for part in self._buffers:
            part.start_gather()
        if not self.overlaps:
            self.finish_param_sync()

    def finish_param_sync(self) -> None:
        """See `NoDataParallel`."""
        for part in self._buffers:
            part.wait()

    def overlap_gather(self, model: nn.Module) -> None:
        """From now on a module of `model` waits for its own weights only, in its next forward."""
        self.overlaps = True
        here = named_params(model)
        part_of = {name: part for part in self._buffers for name in part.names if name in here}
        waited_for = set()
        for path, module in model.named_modules():
            if isinstance(module, Linear | LayerNorm | RMSNorm):
                names = [f"{path}.{name}" for name in named_params(module)]
                parts = [part_of[name] for name in names if name in part_of]  # but frozen ones
                module.register_forward_pre_hook(_waiting(parts))
                waited_for.update(names)
        # Tables are no modules that are called.
        model.register_forward_pre_hook(
            _waiting(part for name, part in part_of.items() if name not in waited_for)
        )


def _waiting(parts: Iterable[ParamBuffer]) -> Callable[..., None]:
    parts = list(dict.fromkeys(parts))

    def wait(*_: object) -> None:
        for part in parts:
            part.wait()

    return wait
