"""Reads, compares and copies the whole tensors of a checkpoint, one by one, in any process."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8lm.checkpoint.files import anybody_may
from fp8lm.checkpoint.loading import Checkpoint, load_checkpoint
from fp8lm.checkpoint.saving import save_checkpoint
from fp8lm.checkpoint.shard import Shard
from fp8lm.checkpoint.state_key import StateKey
from fp8lm.checkpoint.streaming import StreamingSavePlanner

WORD_TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
# Facts about the writer, not about the content.
CIRCUMSTANCES = (
    "config",
    "data",
    "tokenizer",
    "fp8lm_version",
    "torch_version",
    "format_version",
)


@dataclass(frozen=True)
class StoredTensor:
    """Name, dtype and shape of a logical tensor; FP8 payloads have an FP8 dtype."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def stored_tensors(checkpoint: Checkpoint, pattern: str = "*") -> dict[str, StoredTensor]:
    """What is in `checkpoint` under names that match the shell `pattern`, in order of names."""
    stored = checkpoint.tensors
    return {
        name: StoredTensor(name, stored[name].properties.dtype, tuple(stored[name].size))
        for name in sorted(stored)
        if fnmatch.fnmatchcase(name, pattern)
    }


def read_tensor(checkpoint: Checkpoint, stored: StoredTensor) -> Tensor:
    """The whole tensor on the CPU, bit for bit; the first rows if `stored` has fewer than it."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    whole = tuple(checkpoint.tensors[stored.name].size)
    block = Shard(tensor, whole, (0,) * len(whole))
    load_checkpoint(checkpoint, {stored.name: [block]}, ignore_prefix="")
    return tensor


def cut_padding(checkpoint: Checkpoint, stored: StoredTensor, multiple: int = 1) -> StoredTensor:
    """`stored` with no more rows than the tokens need, rounded up to a `multiple`.

    Itself unless it is a word table and the checkpoint says how many tokens it has: how many rows
    pad them depends on the layout that wrote it.
    """
    tokenizer, key = checkpoint.common.get("tokenizer"), StateKey.parse(stored.name)
    if not tokenizer or key is None or key.param not in WORD_TABLES or key.field != "payload":
        return stored
    rows = -(-tokenizer["identity"]["vocab_size"] // multiple) * multiple
    return replace(stored, shape=(min(rows, stored.shape[0]), *stored.shape[1:]))


def differences(one: Checkpoint, two: Checkpoint) -> Iterator[str]:
    """Every fact and every tensor that differs, bit for bit; configs and padding may differ."""
    for key in sorted((one.common.keys() | two.common.keys()) - set(CIRCUMSTANCES)):
        if one.common.get(key) != two.common.get(key):
            yield f"{key}: {one.common.get(key)} and {two.common.get(key)}"
    tensors = stored_tensors(one), stored_tensors(two)
    for name in sorted(tensors[0].keys() | tensors[1].keys()):
        first, second = (found.get(name) for found in tensors)
        if first is not None and second is not None and first.shape != second.shape:
            first, second = cut_padding(one, first), cut_padding(two, second)
        if first is None or second is None or first != second:
            yield f"{name}: {first or 'not there'} and {second or 'not there'}"
        elif found := _first_difference(read_tensor(one, first), read_tensor(two, second)):
            yield f"{name}: {found}"


def copy_checkpoint(
    checkpoint: Checkpoint,
    root: str | os.PathLike[str],
    keep: Callable[[str], bool],
    facts: dict[str, Any],
    verify_owner: Callable[[], None] = anybody_may,
) -> Path:
    """Write the tensors whose names `keep` wants, and the other files, as one process would.

    `root` is where to. `facts` are added to what was saved as `meta`, `verify_owner` is that of
    `save_checkpoint`. One tensor at a time is in memory. Returns the checkpoint's folder.
    """
    config = checkpoint.common.get("config") or {}
    multiple = config.get("model", {}).get("make_vocab_size_divisible_by")
    if type(multiple) is not int or multiple < 1:  # of an unknown version, or made up
        multiple = 1
    wanted = {
        name: cut_padding(checkpoint, stored, multiple)
        for name, stored in stored_tensors(checkpoint).items()
        if keep(name)
    }
    meta = {**checkpoint.common, **facts}
    files = {name: checkpoint.read_file(name) for name in checkpoint.files}
    planner = _CopyPlanner(checkpoint, wanted)
    return save_checkpoint(
        root,
        checkpoint.iteration,
        planner,
        meta,
        verify_owner=verify_owner,
        files=files,
    )


class _CopyPlanner(StreamingSavePlanner):
    """Reads every tensor when it is about to be written."""

    def __init__(self, source: Checkpoint, wanted: dict[str, StoredTensor]) -> None:
        self._source, self._wanted = source, wanted
        shapes = {
            name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            for name, stored in wanted.items()
        }
        super().__init__({name: [Shard.whole(shape)] for name, shape in shapes.items()})

    def make_block(self, name: str, block: Shard) -> Tensor:
        """See `StreamingSavePlanner`."""
        return read_tensor(self._source, self._wanted[name])


def _first_difference(one: Tensor, two: Tensor) -> str | None:
    # As bytes: NaN equals NaN here, and FP8 has no comparison.
    bytes_one, bytes_two = (t.reshape(-1, 1).contiguous().view(torch.uint8) for t in (one, two))
    differing = (bytes_one != bytes_two).any(dim=1)
    count = int(differing.sum())
    if not count:
        return None
    place = int(differing.nonzero()[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), one.shape)]
    codes = [bytes(b[place].tolist()[::-1]).hex() for b in (bytes_one, bytes_two)]
    return (
        f"{count} of {one.numel()} elements differ, the first at {index}: "
        f"0x{codes[0]} and 0x{codes[1]}"
    )
