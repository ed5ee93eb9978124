"""Parameters of one group, divided over its replicas for the optimizer (ZeRO)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fp8lm.config import ParallelConfig
from fp8lm.layers.param import Param
from fp8lm.parallel.param_layout import BufferEntry, ParamLayout, assign_whole_tensors, shard_rows

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
    # Forward can begin with the first weights only if these are gathered before the last.
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
