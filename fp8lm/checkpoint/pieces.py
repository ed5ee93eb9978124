"""A checkpoint written in files one after the other, each of which stays once it is complete.

    __0_0_0.distcp, __0_1_0.distcp, ...    the tensors, in their order, up to a size each
    .piece_0.json, ...                     written after the file: what is where in it, its SHA-256

For what takes long and may be killed: who writes the same again writes only files that are not
complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fp8lm.checkpoint.files import COMMON, anybody_may, publish
from fp8lm.checkpoint.metadata import METADATA
from fp8lm.checkpoint.resharding import ShardSavePlanner
from fp8lm.checkpoint.saving import common_text
from fp8lm.checkpoint.storage import Writer, write_with
from fp8lm.runtime.files import make_folder, write_whole

FOLDER = "writing"
LARGEST = 2**30


def save_in_pieces(
    root: Path,
    iteration: int,
    planner: ShardSavePlanner,
    meta: Mapping[str, Any],
    files: Mapping[str, bytes],
    largest: int = LARGEST,
) -> Path:
    """As `save_checkpoint`, of one process into the folder `root` of its own; the new folder.

    What an earlier call with the same arguments has left in `root` is kept. A file has at most
    `largest` bytes, unless one block alone has more.
    """
    folder = root / FOLDER
    make_folder(folder)
    digests = write_pieces(folder, planner, largest)
    common = {COMMON: common_text(iteration, meta).encode()}
    return publish(folder, iteration, digests, {**files, **common}, anybody_may)


def write_pieces(folder: Path, planner: ShardSavePlanner, largest: int = LARGEST) -> dict[str, str]:
    """As `write_shards`, of one process: the SHA-256 of the files, by name.

    Pieces that an earlier call with the same arguments has left in `folder` are kept.
    """
    (folder / METADATA).unlink(missing_ok=True)
    writer = _PieceWriter(folder, largest)
    write_with(writer, planner, None)
    for record in folder.glob(_Piece.RECORD.format("*")):
        record.unlink()
    return {**writer.digests, **writer.files.digests}  # of pieces and of the metadata


@dataclass(frozen=True)
class _Piece:
    """A complete file: its name, SHA-256, and what is where in it."""

    RECORD = ".piece_{}.json"

    file: str
    digest: str
    results: list[WriteResult]

    def text(self) -> str:
        items = [
            {
                "name": result.index.fqn,
                "place": [result.index.offset, result.index.index],
                "bytes": result.size_in_bytes,
                "at": [result.storage_data.offset, result.storage_data.length],
            }
            for result in self.results
        ]
        return json.dumps({"file": self.file, "digest": self.digest, "items": items}) + "\n"

    @classmethod
    def parse(cls, text: str) -> _Piece:
        found = json.loads(text)
        results = []
        for item in found["items"]:
            offset, number = item["place"]
            offset = None if offset is None else torch.Size(offset)
            index = MetadataIndex(item["name"], offset, number)
            info = _StorageInfo(found["file"], *item["at"])
            results.append(WriteResult(index, item["bytes"], info))
        return cls(found["file"], found["digest"], results)


class _PieceWriter(Writer):
    def __init__(self, folder: Path, largest: int) -> None:
        super().__init__(folder)
        self._folder, self._largest = folder, largest
        self.digests: dict[str, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_pieces(plan.items, self._largest)):
            piece = self._kept(number) or self._written(number, plan, items, planner)
            self.digests[piece.file] = piece.digest
            results += piece.results
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _kept(self, number: int) -> _Piece | None:
        record = self._folder / _Piece.RECORD.format(number)
        return _Piece.parse(record.read_text()) if record.is_file() else None

    def _written(
        self, number: int, plan: SavePlan, items: list[WriteItem], planner: SavePlanner
    ) -> _Piece:
        prefix = f"__0_{number}_"
        for half in self._folder.glob(f"{prefix}*"):  # of a process that was killed
            half.unlink()
        part = replace(plan, items=items, storage_data=_StoragePrefix(prefix))
        results = super().write_data(part, planner).wait()
        ((file, digest),) = self.files.digests.items()
        self.files.digests.clear()
        piece = _Piece(file, digest, results)
        write_whole(self._folder / _Piece.RECORD.format(number), piece.text())
        return piece


def _pieces(items: list[WriteItem], largest: int) -> Iterator[list[WriteItem]]:
    """`items` in groups of at most `largest` bytes, in their order."""
    group: list[WriteItem] = []
    size = 0
    for item in items:
        assert item.tensor_data is not None
        own = math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        if group and size + own > largest:
            yield group
            group, size = [], 0
        group.append(item)
        size += own
    if group:
        yield group
