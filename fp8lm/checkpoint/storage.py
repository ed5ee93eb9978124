"""Reads and writes the tensor files of a checkpoint, through torch.distributed.checkpoint.

Payloads are stored as they are, dtype for dtype. Files are hashed and fsynced as they are written,
and read with `weights_only`.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fp8lm.checkpoint.collectives import Group
from fp8lm.checkpoint.resharding import (
    ShardLoadPlanner,
    Shards,
    ShardSavePlanner,
    select,
)
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import create, open_regular

_AnyPath = str | os.PathLike[Any]


def write_shards(folder: Path, planner: ShardSavePlanner, group: Group) -> dict[str, str]:
    """Write all ranks' shards into `folder`; an error of one rank is raised on all of them.

    Returns the SHA-256 of the files that this rank wrote, by name.
    """
    writer = Writer(folder)
    write_with(writer, planner, group)
    return writer.files.digests


def write_with(writer: Writer, planner: ShardSavePlanner, group: Group) -> None:
    """Write all ranks' shards by `writer`; an error of one rank is raised on all of them."""
    with _plain_errors():
        dcp.save(
            dict(planner.offered),
            storage_writer=writer,
            planner=planner,
            process_group=group,
            no_dist=not dist.is_initialized(),
        )


def read_shards(
    folder: Path,
    metadata: Metadata,
    shards: Shards,
    group: Group,
    ignore_prefix: str | None = None,
    known: Collection[str] = (),
) -> None:
    """Fill all ranks' shards in place; an error of one rank is raised on all of them.

    Nothing is filled if some tensor does not fit (`InputError`); tensors whose names begin with
    `ignore_prefix` or are in `known` of some rank need not be asked for.
    """
    with _plain_errors():
        dcp.load(
            dict(shards),
            storage_reader=_Reader(folder, metadata),
            planner=ShardLoadPlanner(ignore_prefix, known),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )


def read_blocks(folder: Path, metadata: Metadata, shards: Shards) -> None:
    """Fill this rank's `shards` in place, whatever the other ranks do.

    Raises `InputError` for tensors that do not fit or cannot be read.
    """
    planner, reader = ShardLoadPlanner(), _Reader(folder, metadata)
    planner.set_up_planner(shards, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner)


@contextmanager
def _plain_errors() -> Iterator[None]:
    # Filters belong to the process, not to a thread: with a process group, when a checkpoint may be
    # written beside the training, they are left alone.
    alone = not dist.is_initialized()
    with warnings.catch_warnings() if alone else nullcontext():
        if alone:
            warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
        try:
            yield
        except CheckpointException as error:
            cause, _ = error.failures[min(error.failures)]
            raise cause from error


class _Files(FileSystem):
    """Hashes what is written, and remembers why a write failed.

    torch.save reports only that the position is off.
    """

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: _AnyPath, mode: str) -> Iterator[io.IOBase]:
        # Unbuffered: the failing write is seen here, and torch.save writes large blocks. The
        # folder is new, so that a name that is taken has been planted.
        with os.fdopen(create(Path(path)), mode, buffering=0) as stream:
            recorder = _Recorder(stream, self)
            yield recorder
        self.digests[Path(path).name] = recorder.digest.hexdigest()

    def rename(self, path: _AnyPath, new_path: _AnyPath) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _Recorder(io.IOBase):
    def __init__(self, stream: IO[bytes], files: _Files) -> None:
        self.digest = hashlib.sha256()
        self._stream = stream
        self._files = files

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`, in order: nothing here seeks."""
        view = memoryview(data).cast("B")
        self.digest.update(view)
        written = 0
        try:
            while written < len(view):
                written += self._stream.write(view[written:])
        except OSError as error:
            self._files.error = self._files.error or error
            raise
        return written

    def tell(self) -> int:
        return self._stream.tell()

    def fileno(self) -> int:
        return self._stream.fileno()


class Writer(dcp.FileSystemWriter):
    """Writes files into a folder that is there, and hashes them: see `_Files`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = self.files = _Files()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # Rank 0 has made the folder, and torch would make a second one where that is not seen.
        if not Path(self.path).is_dir():
            raise FileNotFoundError(f"{self.path}, which rank 0 has made, is not there")
        return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if self.files.error is not None:
                raise self.files.error from error
            raise

    def storage_meta(self) -> StorageMeta | None:
        return None  # it would name the temporary folder


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for path, reads in self._by_file(plan).items():
            with open_regular(path) as file:
                for where, item in sorted(reads, key=lambda read: read[0].offset):
                    file.seek(where.offset)
                    target = planner.resolve_tensor(item)
                    sizes = self._sizes(item.storage_index)
                    target.copy_(_decode(file.read(where.length), path, item, target.dtype, sizes))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _sizes(self, index: MetadataIndex) -> torch.Size:
        stored = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(stored, TensorStorageMetadata)
        return next(chunk.sizes for chunk in stored.chunks if chunk.offsets == index.offset)

    def _by_file(self, plan: LoadPlan) -> dict[Path, list[tuple[_StorageInfo, ReadItem]]]:
        files = defaultdict(list)
        for item in plan.items:
            where = self.storage_data.get(item.storage_index)
            if where is None:
                raise InputError(f"{self.path} does not say where {item.storage_index} is")
            files[self.path / where.relative_path].append((where, item))
        return files


def _decode(
    data: bytes, path: Path, item: ReadItem, dtype: torch.dtype, sizes: torch.Size
) -> Tensor:
    try:
        _check_archive(data)
        stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        # Or rows would be left out that .metadata does not mention.
        if stored.shape != sizes:
            raise ValueError(f"found {list(stored.shape)}, expected {list(sizes)}")
        part = select(stored, item.storage_offsets, item.lengths)
        if part.dtype != dtype:
            raise TypeError(f"found {part.dtype}, expected {dtype}")
    except Exception as error:  # damaged bytes can fail in any way
        raise InputError(f"{path} is damaged at {item.storage_index.fqn}: {error}") from error
    return part


def _check_archive(data: bytes) -> None:
    """Raise for what torch.save would not write: other formats, compression, entries that overlap.

    So that reading takes no more memory than the file has bytes.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in entries) > len(data):
        raise ValueError("it says that it holds more than it does")
