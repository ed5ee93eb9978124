"""The distributed optimizer (ZeRO): every replica updates a shard (FP8-LM, section 2.3).

    reduce     gradients to the rank that owns their rows                   (`fp8lm.gradient`)
    update     the rows that a rank owns                                    (`fp8lm.optim`)
    gather     the owners' new parameters to all ranks, payloads as they are stored

Optimizer states (ZeRO stage 1) and reduced gradients (stage 2) are sharded. Bytes that a rank sends
in a step for N one-byte parameters on d ranks, without padding:

    reduce (d-1)/d N        gather (d-1)/d N
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fp8lm.config import ParallelConfig
from fp8lm.gradient.buckets import GradientBuckets
from fp8lm.layers.linear import Linear
from fp8lm.layers.norm import Norm
from fp8lm.layers.param import Param, named_params
from fp8lm.parallel.data_parallel import BucketedDataParallel
from fp8lm.parallel.param_buffer import ParamBuffer
from fp8lm.parallel.param_layout import BufferEntry, ParamLayout, assign_whole_tensors, shard_rows
from fp8lm.scaled_tensor import ScaledTensor

PARTITIONS = {"tensor": assign_whole_tensors, "even": shard_rows}


@dataclass(frozen=True)
class ShardedParams:
    """Parameters in the `parts` that are gathered separately, and the layout of each part."""

    parts: list[dict[str, Param]]
    layouts: list[ParamLayout]

    @cached_property
    def rows(self) -> list[dict[str, tuple[int, int]]]:
        """The rows of every parameter that each replica owns."""
        return [
            {name: span for layout in self.layouts for name, span in layout.rows[rank].items()}
            for rank in range(self.layouts[0].num_ranks)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, padding included."""
        return sum(sum(layout.shard_bytes) for layout in self.layouts)


def shard_params(
    parallel: ParallelConfig, params: dict[str, Param], num_replicas: int
) -> ShardedParams:
    """`params` divided over `num_replicas` as config section `parallel` says."""
    # Several parts let forward start before the last weights have arrived.
    size = parallel.ddp_bucket_size if parallel.overlap_param_gather else None
    parts = in_parts(params, size)
    place = PARTITIONS[parallel.partition]
    return ShardedParams(parts, place([tensors_of(part) for part in parts], num_replicas))


def tensors_of(params: Mapping[str, Param]) -> list[BufferEntry]:
    """The model parameters of `params` as entries of a `ParamLayout`."""
    made = []
    for name, param in params.items():
        payload = param.model_param.payload
        rows = payload.shape[0]
        made.append(BufferEntry(name, rows, payload.numel() // rows, payload.itemsize))
    return made


def in_parts(params: dict[str, Param], size: int | None) -> list[dict[str, Param]]:
    """`params` in parts of about `size` elements, in order; None: all in one."""
    parts: list[dict[str, Param]] = [{}]
    count = 0
    for name, param in params.items():
        if size is not None and count >= size:
            parts.append({})
            count = 0
        parts[-1][name] = param
        count += param.spec.numel
    return parts


class ZeroDataParallel(BucketedDataParallel):
    """Every rank updates its rows; model parameters are views of all-gathered buffers.

    `buffers` together hold all weights, in the order of forward.
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
        """Overlap the all-gather with forward: modules of `model` wait for their own weights."""
        self.overlaps = True
        here = named_params(model)
        part_of = {name: part for part in self._buffers for name in part.names if name in here}
        parts_of: dict[nn.Module, list[ParamBuffer]] = {}

        def wait(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A norm that a layer applies to its input, its prologue, is not called itself.
            for called in (module, *args, *kwargs.values()):
                if isinstance(called, nn.Module):
                    _wait_for(parts_of.get(called, ()))

        waited_for = set()
        for path, module in model.named_modules():
            if isinstance(module, Linear | Norm):
                names = [f"{path}.{name}" for name in named_params(module)]
                # Frozen weights are in no part.
                parts_of[module] = [part_of[name] for name in names if name in part_of]
                module.register_forward_pre_hook(wait, with_kwargs=True)
                waited_for.update(names)
        # Embedding tables are modules that are never called.
        others = [part for name, part in part_of.items() if name not in waited_for]
        model.register_forward_pre_hook(lambda *_: _wait_for(others))


def _wait_for(parts: Iterable[ParamBuffer]) -> None:
    for part in dict.fromkeys(parts):
        part.wait()
