"""Writes a model that comes from elsewhere as a checkpoint, block by block of rows.

Without optimizer states it is a release: a run starts from it with `checkpoint.pretrained`. With
them a run goes on from it with `checkpoint.load`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fp8lm.checkpoint import Shard, StateKey
from fp8lm.checkpoint.pieces import LARGEST, save_in_pieces
from fp8lm.checkpoint.streaming import StreamingSavePlanner
from fp8lm.config import Config, build_config
from fp8lm.config.yaml_format import to_yaml
from fp8lm.convert.output import conversion_folder
from fp8lm.convert.tokenizers import config_section
from fp8lm.convert.weights import BLOCK_ELEMENTS
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.kernels import ReferenceKernels
from fp8lm.numerics import Format
from fp8lm.runtime.files import write_whole
from fp8lm.training.progress import MetricAccumulator, Progress
from fp8lm.training.spikes import LossSpikeDetector
from fp8lm.training.state import KINDS

MODEL_CONFIG = "model.yaml"
Progressed = Callable[[int], object]
T = TypeVar("T")


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

    def amax(self) -> Tensor:
        """The largest magnitude of all elements (0-d fp32), block by block."""
        found, most = torch.zeros(()), max(1, BLOCK_ELEMENTS // math.prod(self.shape[1:]))
        for first in range(0, self.shape[0], most):
            rows = self.read(first, min(first + most, self.shape[0]))
            found = torch.maximum(found, ReferenceKernels().amax(rows.float()))
        return found

    def block(self, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The block of `size` at `offset`, both as a checkpoint has them."""
        row, count = offset[0], size[0]
        if self.sections is not None:
            row, count = offset[0] * self.stored_shape[1] + offset[1], size[1]
        return self.read(row, row + count).view(size)


@dataclass(frozen=True)
class TrainingState:
    """Optimizer states that come in with a model: what a training goes on from.

    `kinds` are master and moments by kind and parameter. `sections` are those of the config that
    the training had.
    """

    iteration: int
    consumed_samples: int
    batch_size: int
    num_steps: int
    kinds: Mapping[str, Mapping[str, Incoming]]
    sections: Mapping[str, Any]

    def tensors(self) -> dict[StateKey, Incoming]:
        """The states."""
        return {
            StateKey(kind, param, "payload"): state
            for kind, params in self.kinds.items()
            for param, state in params.items()
        }

    def small(self) -> dict[StateKey, Tensor]:
        """What a checkpoint has beside them. The amaxes take a look at all states."""
        found = {key: torch.ones(()) for key in map(_scale_of, self.tensors())}
        found[StateKey("num_steps")] = torch.tensor(self.num_steps)
        found[StateKey("window")] = torch.zeros(len(MetricAccumulator.FIELDS), dtype=torch.float64)
        for param in self.kinds[KINDS[0]]:
            amaxes = [self.kinds[kind][param].amax() for kind in KINDS]
            found[StateKey("amax", param)] = torch.stack(amaxes)
        return found

    def facts(self) -> dict[str, Any]:
        """For `common.json`."""
        progress = Progress(self.iteration, self.consumed_samples, self.batch_size)
        return {**asdict(progress), "losses": LossSpikeDetector(None, 1).state}


def _scale_of(key: StateKey) -> StateKey:
    return StateKey(key.kind, key.param, "scale")


@dataclass(frozen=True)
class Import:
    """A model that comes in: sections of its config, tokenizer, parameters; lines that say what.

    `training`: optimizer states, if they come in, too.
    """

    model: dict[str, Any]
    precision: dict[str, Any]
    tokenizer: Tokenizer
    params: dict[str, Incoming]
    lines: list[str]
    training: TrainingState | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors but small ones."""
        states = {} if self.training is None else self.training.tensors()
        return sum(tensor.nbytes for tensor in (*self.params.values(), *states.values()))

    @property
    def iteration(self) -> int:
        """Of the checkpoint."""
        return 0 if self.training is None else self.training.iteration


def import_model(
    plan: Import,
    output: Path,
    conversion: Mapping[str, Any],
    progress: Progressed,
    largest: int = LARGEST,
) -> None:
    """Write `plan` to the folder `output` as a checkpoint, in files of at most `largest` bytes.

    Files that the same `conversion` has written before it was killed are kept.
    """
    place = output.resolve() / f"iter_{plan.iteration:07d}"
    training = _OF_A_RELEASE if plan.training is None else plan.training.sections
    config = build_config(
        {
            **training,
            "model": plan.model,
            "precision": plan.precision,
            "tokenizer": config_section(plan.tokenizer, place),
        }
    )
    with conversion_folder(output, conversion) as work:
        write_model(work, config, plan, progress, largest)


# A release is not trained on: what must be there says nothing.
_OF_A_RELEASE = {
    "train": {"micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1},
    "optimizer": {"lr": 1e-5},
    "data": {"mock_data": True},
}


def precision_of(dtype: str, *, outer_layers_bf16: bool = False) -> dict[str, Any]:
    """Section `precision` of a config under which weights in `dtype` load as they are stored."""
    match dtype:
        case "bf16":
            return {"preset": "bf16"}
        case "fp32":
            return {"preset": "bf16", "gemm": "fp32", "params_dtype": "fp32"}
        case _:
            return {"preset": "o3", "first_last_layers_bf16": outer_layers_bf16}


def write_model(
    root: Path, config: Config, plan: Import, progress: Progressed, largest: int = LARGEST
) -> None:
    """Write the checkpoint under `root`, and the config's model and tokenizer as `MODEL_CONFIG`.

    `progress` is told the bytes of every block that has been read.
    """
    tokenizer, training = plan.tokenizer, plan.training
    meta = {
        "config": config.model_dump(mode="json"),
        "tokenizer": {"identity": dict(tokenizer.identity), "files": sorted(tokenizer.files)},
        "data": [],
        **({"released": True} if training is None else training.facts()),
    }
    tensors = {StateKey("weight", name, "payload"): param for name, param in plan.params.items()}
    small = {
        StateKey("weight", name, "scale"): param.scale
        for name, param in plan.params.items()
        if param.scale is not None
    }
    if training is not None:
        tensors |= training.tensors()
        small |= training.small()
    planner = LazyPlanner(by_text(tensors), by_text(small), progress)
    save_in_pieces(root, plan.iteration, planner, meta, tokenizer.files, largest)
    sections = {name: config.model_dump(mode="json")[name] for name in ("model", "tokenizer")}
    head = "# The model and tokenizer of these weights: the base of a config that trains them on.\n"
    write_whole(root / MODEL_CONFIG, head + to_yaml(sections))


def by_text(tensors: Mapping[StateKey, T]) -> dict[str, T]:
    """By the names in a checkpoint."""
    return {str(key): tensor for key, tensor in tensors.items()}


class LazyPlanner(StreamingSavePlanner):
    """Reads every block of `tensors` when it is about to be written; `small` ones are there."""

    def __init__(
        self, tensors: Mapping[str, Incoming], small: Mapping[str, Tensor], progress: Progressed
    ) -> None:
        self._tensors, self._progress = tensors, progress
        offered = {name: list(tensor.shards()) for name, tensor in tensors.items()}
        super().__init__(offered | {name: [Shard.whole(own)] for name, own in small.items()})

    def make_block(self, name: str, block: Shard) -> Tensor:
        """See `StreamingSavePlanner`."""
        made = self._tensors[name].block(block.offset, tuple(block.tensor.shape))
        self._progress(made.nbytes)
        return made
