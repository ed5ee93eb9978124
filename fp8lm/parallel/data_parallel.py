"""Data parallelism: replicas of the model, whose gradients are reduced (FP8-LM, section 2.1).

`NoDataParallel` is a single replica. With `DistributedDataParallel` every rank holds all optimizer
states; `fp8lm.parallel.distributed_optimizer` shards them. Bytes that a rank sends in a step for N
one-byte parameters on d ranks, without padding: 2 (d-1)/d N.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fp8lm.comm.groups import ParamGroup
from fp8lm.gradient.buckets import GradientBuckets
from fp8lm.layers.param import Param
from fp8lm.layers.shard_spec import Rows
from fp8lm.scaled_tensor import ScaledTensor


class NoDataParallel:
    """One replica; `local_shards` are the rows (first dimension) of each parameter it updates."""

    padding = 0  # bytes held beside the weights

    def __init__(self, weights: dict[str, Param]) -> None:
        self.weights = weights
        self.local_shards: dict[str, Rows] = {
            name: (0, weight.spec.local_shape[0]) for name, weight in weights.items()
        }

    def is_norm_owner(self, name: str) -> bool:
        """Whether this rank counts the reduced gradient of parameter `name` in the norm.

        If several replicas have the same gradient, one counts it.
        """
        return True

    def enable_grad_sync(self) -> None:
        """Reduce gradients in the next backward, the last of the step."""

    def reduce(self) -> dict[str, ScaledTensor]:
        """Mean over the replicas of the owned rows' gradients, by weight."""
        for weight in self.weights.values():
            weight.main_grad.zero_if_unused()  # a weight that no micro-batch used
        return {name: weight.main_grad.value for name, weight in self.weights.items()}

    def finish_param_sync(self) -> None:
        """Wait for the last step's parameter all-gather; a forward waits by itself."""

    def named_tensors(self) -> dict[str, Tensor]:
        """State of the reduction, for a checkpoint."""
        return {}

    def start_param_sync(self, skipped: Tensor) -> None:
        """All-gather the updated parameters; `skipped` (0-d bool): the step changed none."""


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
