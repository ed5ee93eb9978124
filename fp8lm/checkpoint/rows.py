"""Reads some rows of a stored tensor, without the memory that the blocks which hold them take.

A block is an archive as torch.save writes it, uncompressed: its numbers lie in it row by row, so
that rows can be read from where they are. A gated matrix is stored as [2, rows, columns]; here it
has 2 * rows.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from fp8lm.checkpoint.loading import Checkpoint
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import open_regular

_LOCAL_HEADER = 30  # bytes of a zip entry before its name, whose length and another's end them


@dataclass(frozen=True)
class _Block:
    """Rows `first` to `last` and columns from `column` of a tensor, at `start` in `path`."""

    path: Path
    start: int
    first: int
    last: int
    column: int
    width: int


class StoredRows:
    """The rows of the tensors of `checkpoint`, on the CPU, bit for bit."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._blocks: dict[str, list[_Block]] = {}

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Of the tensor, its leading dimensions joined so that `ndim` are left."""
        size = tuple(self._checkpoint.tensors[name].size)
        joined = len(size) - ndim + 1
        return (math.prod(size[:joined]), *size[joined:])

    def read(self, name: str, start: int, stop: int, ndim: int) -> Tensor:
        """Rows `start` to `stop` of a tensor of one or two dimensions (`ndim`)."""
        if name not in self._blocks:
            self._blocks[name] = list(self._find_blocks(name, ndim))
        dtype = self._checkpoint.tensors[name].properties.dtype
        columns = math.prod(self.shape(name, ndim)[1:])
        rows = torch.empty(stop - start, columns, dtype=dtype)
        for block in self._blocks[name]:
            first, last = max(start, block.first), min(stop, block.last)
            if first < last:
                target = rows[first - start : last - start, block.column :][:, : block.width]
                _read_into(target, block, first - block.first, name)
        return rows if ndim == 2 else rows.view(-1)

    def _find_blocks(self, name: str, ndim: int) -> Iterator[_Block]:
        stored = self._checkpoint.tensors[name]
        joined = len(stored.size) - ndim
        if joined not in (0, 1):
            raise InputError(f"{self._checkpoint.folder}: {name} has {len(stored.size)} dimensions")
        for chunk in stored.chunks:
            where = self._checkpoint.metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            path = self._checkpoint.folder / where.relative_path
            try:
                with open_regular(path) as file:
                    view = FileView(file, where.offset, where.length)
                    start = where.offset + _start_of_numbers(view, chunk.sizes)
            except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
                raise InputError(f"{path} is damaged at {name}: {error}") from error
            yield from _blocks(path, start, chunk, stored.size, joined, stored.properties.dtype)


def _blocks(
    path: Path,
    start: int,
    chunk: ChunkStorageMetadata,
    size: torch.Size,
    joined: int,
    dtype: torch.dtype,
) -> Iterator[_Block]:
    sections = range(chunk.sizes[0]) if joined else range(1)
    rows, first = chunk.sizes[joined], chunk.offsets[joined]
    width = math.prod(chunk.sizes[joined + 1 :])
    column = chunk.offsets[joined + 1] if len(size) > joined + 1 else 0
    for section in sections:
        before = (chunk.offsets[0] + section) * size[1] if joined else 0
        at = start + section * rows * width * dtype.itemsize
        yield _Block(path, at, before + first, before + first + rows, column, width)


def _start_of_numbers(view: FileView, shape: torch.Size) -> int:
    """Where in the archive `view` the numbers of a tensor of `shape` begin."""
    with torch.serialization.skip_data():
        stored = torch.load(cast(IO[bytes], view), map_location="cpu", weights_only=True)
    if stored.shape != shape or not stored.is_contiguous() or stored.storage_offset():
        raise ValueError("its numbers do not lie row by row")
    with zipfile.ZipFile(view) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data/0")]
    if len(entries) != 1 or entries[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is not one uncompressed tensor")
    if entries[0].file_size != stored.nbytes:
        raise ValueError(f"it has {entries[0].file_size} bytes, and {stored.nbytes} are expected")
    view.seek(entries[0].header_offset + _LOCAL_HEADER - 4)
    name, extra = struct.unpack("<HH", view.read(4))
    return entries[0].header_offset + _LOCAL_HEADER + name + extra


def _read_into(target: Tensor, block: _Block, row: int, name: str) -> None:
    """Fill `target` with the block's rows from number `row` on."""
    read = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
    data = read.view(torch.uint8).view(-1).numpy().data
    with open_regular(block.path) as file:
        place = block.start + row * block.width * target.dtype.itemsize
        if os.preadv(file.fileno(), [data], place) != data.nbytes:
            raise InputError(f"{block.path} is truncated at {name}")
    if read is not target:
        target.copy_(read)


class FileView(io.RawIOBase):
    """The `length` bytes of `file` from `start` on, as a file to read."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        left = max(0, self._length - self._at)
        data = memoryview(buffer).cast("B")[:left]
        count = os.preadv(self._file.fileno(), [data], self._start + self._at)
        self._at += count
        return count
