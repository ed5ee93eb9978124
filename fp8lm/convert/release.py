"""Writes weights that come from elsewhere as a checkpoint without optimizer states, a release.

One block of rows at a time is in memory. A run starts from it with `checkpoint.pretrained`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from fp8lm.checkpoint import Shard, StateKey, save_checkpoint
from fp8lm.checkpoint.resharding import ShardSavePlanner
from fp8lm.config import Config
from fp8lm.config.yaml_format import to_yaml
from fp8lm.convert.weights import BLOCK_ELEMENTS
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.numerics import Format
from fp8lm.runtime.files import write_whole

MODEL_CONFIG = "model.yaml"


@dataclass(frozen=True)
class Incoming:
    """A parameter of `shape` in `format`; `read(start, stop)` gives rows in the format's dtype.

    `num_sections`: 2 for a gated matrix, whose halves a checkpoint keeps apart (see `ShardSpec`).
    """

    shape: tuple[int, ...]
    format: Format
    read: Callable[[int, int], Tensor]
    scale: Tensor | None = None
    num_sections: int = 1

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As a checkpoint has it."""
        if self.num_sections == 1:
            return self.shape
        return (self.num_sections, self.shape[0] // self.num_sections, *self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.format.bytes

    def shards(self) -> Iterator[Shard]:
        """Blocks of rows, on the meta device."""
        rows = self.shape[0] // self.num_sections
        most = max(1, BLOCK_ELEMENTS // math.prod(self.shape[1:]))
        dtype, tail = self.format.dtype, self.shape[1:]
        for section in range(self.num_sections):
            for first in range(0, rows, most):
                size: tuple[int, ...] = (min(most, rows - first), *tail)
                offset: tuple[int, ...] = (first, *(0 for _ in tail))
                if self.num_sections > 1:
                    size, offset = (1, *size), (section, *offset)
                block = torch.empty(size, dtype=dtype, device="meta")
                yield Shard(block, self.stored_shape, offset)

    def block(self, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The block of `size` at `offset`, both as a checkpoint has them."""
        row, count = offset[0], size[0]
        if self.num_sections > 1:
            row, count = offset[0] * self.stored_shape[1] + offset[1], size[1]
        return self.read(row, row + count).view(size)


def write_release(
    root: Path,
    config: Config,
    tokenizer: Tokenizer,
    params: Mapping[str, Incoming],
    facts: Mapping[str, Any],
    progress: Callable[[int], object],
) -> None:
    """Write checkpoint 0 under `root`, and the config's model and tokenizer as `MODEL_CONFIG`.

    `progress` is told the bytes of every block that has been read.
    """
    meta = {
        **facts,
        "config": config.model_dump(mode="json"),
        "tokenizer": {"identity": dict(tokenizer.identity), "files": sorted(tokenizer.files)},
        "data": [],
        "released": True,
    }
    save_checkpoint(root, 0, _Planner(params, progress), meta, files=tokenizer.files)
    sections = {name: config.model_dump(mode="json")[name] for name in ("model", "tokenizer")}
    head = "# The model and tokenizer of these weights: the base of a config that trains them on.\n"
    write_whole(root / MODEL_CONFIG, head + to_yaml(sections))


class _Planner(ShardSavePlanner):
    """Reads every block when it is about to be written."""

    def __init__(self, params: Mapping[str, Incoming], progress: Callable[[int], object]) -> None:
        self._params, self._progress = params, progress
        offered: dict[str, list[Shard]] = {}
        for name, param in params.items():
            offered[str(StateKey("weight", name, "payload"))] = list(param.shards())
            if param.scale is not None:
                offered[str(StateKey("weight", name, "scale"))] = [Shard.whole(param.scale)]
        super().__init__(offered)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """See `ShardSavePlanner`."""
        key = StateKey.parse(write_item.index.fqn)
        if key is None or key.field == "scale" or write_item.tensor_data is None:
            return super().resolve_data(write_item)
        size = tuple(write_item.tensor_data.chunk.sizes)
        block = self._params[key.param].block(tuple(write_item.index.offset or ()), size)
        self._progress(block.nbytes)
        return block
