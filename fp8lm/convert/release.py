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

from fp8lm.checkpoint import Shard, StateKey, save_checkpoint
from fp8lm.checkpoint.streaming import StreamingSavePlanner
from fp8lm.config import Config, build_config
from fp8lm.config.yaml_format import to_yaml
from fp8lm.convert.output import finish_output, start_output
from fp8lm.convert.tokenizers import config_section
from fp8lm.convert.weights import BLOCK_ELEMENTS
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.numerics import Format
from fp8lm.runtime.files import write_whole

MODEL_CONFIG = "model.yaml"
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Incoming:
    """A parameter of `shape` in `format`; `read(start, stop)` gives rows in the format's dtype.

    `sections`: a checkpoint keeps it as a stack of so many equal parts of its rows, as it does the
    halves of a gated matrix (see `ShardSpec`); None: not as a stack.
    """

    shape: tuple[int, ...]
    format: Format
    read: Callable[[int, int], Tensor]
    scale: Tensor | None = None
    sections: int | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As a checkpoint has it."""
        if self.sections is None:
            return self.shape
        return (self.sections, self.shape[0] // self.sections, *self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.format.bytes

    def shards(self) -> Iterator[Shard]:
        """Blocks of rows, on the meta device."""
        rows = self.shape[0] // (self.sections or 1)
        most = max(1, BLOCK_ELEMENTS // math.prod(self.shape[1:]))
        dtype, tail = self.format.dtype, self.shape[1:]
        for section in range(self.sections or 1):
            for first in range(0, rows, most):
                size: tuple[int, ...] = (min(most, rows - first), *tail)
                offset: tuple[int, ...] = (first, *(0 for _ in tail))
                if self.sections is not None:
                    size, offset = (1, *size), (section, *offset)
                block = torch.empty(size, dtype=dtype, device="meta")
                yield Shard(block, self.stored_shape, offset)

    def block(self, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The block of `size` at `offset`, both as a checkpoint has them."""
        row, count = offset[0], size[0]
        if self.sections is not None:
            row, count = offset[0] * self.stored_shape[1] + offset[1], size[1]
        return self.read(row, row + count).view(size)


@dataclass(frozen=True)
class Import:
    """A model that comes in: sections of its config, tokenizer, parameters; lines that say what."""

    model: dict[str, Any]
    precision: dict[str, Any]
    tokenizer: Tokenizer
    params: dict[str, Incoming]
    lines: list[str]


def import_model(
    plan: Import, output: Path, conversion: Mapping[str, Any], progress: Progress
) -> None:
    """Write `plan` to the folder `output` as a checkpoint."""
    config = build_config(
        {
            "model": plan.model,
            "precision": plan.precision,
            # A release is not trained on: what must be there says nothing.
            "train": {"micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1},
            "optimizer": {"lr": 1e-5},
            "data": {"mock_data": True},
            "tokenizer": config_section(plan.tokenizer, output.resolve() / "iter_0000000"),
        }
    )
    work = start_output(output, conversion)
    write_release(work, config, plan.tokenizer, plan.params, progress)
    finish_output(work, output)


def precision_of(dtype: str, *, outer_layers_bf16: bool = False) -> dict[str, Any]:
    """Section `precision` of a config under which weights in `dtype` load as they are stored."""
    match dtype:
        case "bf16":
            return {"preset": "bf16"}
        case "fp32":
            return {"preset": "bf16", "gemm": "fp32", "params_dtype": "fp32"}
        case _:
            return {"preset": "o3", "first_last_layers_bf16": outer_layers_bf16}


def write_release(
    root: Path,
    config: Config,
    tokenizer: Tokenizer,
    params: Mapping[str, Incoming],
    progress: Progress,
) -> None:
    """Write checkpoint 0 under `root`, and the config's model and tokenizer as `MODEL_CONFIG`.

    `progress` is told the bytes of every block that has been read.
    """
    meta = {
        "config": config.model_dump(mode="json"),
        "tokenizer": {"identity": dict(tokenizer.identity), "files": sorted(tokenizer.files)},
        "data": [],
        "released": True,
    }
    tensors = {str(StateKey("weight", name, "payload")): param for name, param in params.items()}
    scales = {
        str(StateKey("weight", name, "scale")): param.scale
        for name, param in params.items()
        if param.scale is not None
    }
    save_checkpoint(root, 0, LazyPlanner(tensors, scales, progress), meta, files=tokenizer.files)
    sections = {name: config.model_dump(mode="json")[name] for name in ("model", "tokenizer")}
    head = "# The model and tokenizer of these weights: the base of a config that trains them on.\n"
    write_whole(root / MODEL_CONFIG, head + to_yaml(sections))


class LazyPlanner(StreamingSavePlanner):
    """Reads every block of `tensors` when it is about to be written; `small` ones are there."""

    def __init__(
        self, tensors: Mapping[str, Incoming], small: Mapping[str, Tensor], progress: Progress
    ) -> None:
        self._tensors, self._progress = tensors, progress
        offered = {name: list(tensor.shards()) for name, tensor in tensors.items()}
        super().__init__(offered | {name: [Shard.whole(own)] for name, own in small.items()})

    def make_block(self, name: str, block: Shard) -> Tensor:
        """See `StreamingSavePlanner`."""
        made = self._tensors[name].block(block.offset, tuple(block.tensor.shape))
        self._progress(made.nbytes)
        return made
