"""Reading a checkpoint's `.metadata` without running anything it says.

torch.distributed.checkpoint stores its metadata pickled, and a pickle can call any function. The
unpickler here knows only the plain data classes such a file consists of and refuses every other
name before it is imported.
"""

from __future__ import annotations

import enum
import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from fp8lm.checkpoint.pickle_screen import screen
from fp8lm.runtime.errors import InputError

METADATA = ".metadata"
LARGEST_METADATA = 2**28  # bytes: about a million blocks
LONGEST_NAME = 1000
MOST_DIMS = 16
MOST_BYTES = 2**60
MOST_OVERHEAD = 2**16  # bytes that torch.save adds to a tensor's own


class DamagedCheckpoint(InputError):
    """A checkpoint that is incomplete or not what was written: an older one may serve."""


_DTYPES = frozenset(
    (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    )
)
_CLASSES = (
    *(
        (metadata.__name__, name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    ),
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
)


def parse_metadata(data: bytes) -> Metadata:
    """What the bytes of a .metadata say, and nothing else that may be in them.

    `InputError` if they name anything foreign; other exceptions if they make no sense: shapes and
    blocks that do not fit each other or the bytes that are said to hold them.
    """
    screen(data)
    found = _Unpickler(io.BytesIO(data)).load()
    if type(found) is not Metadata:
        raise TypeError(f"expected Metadata, found {type(found).__name__}")
    tensors = {_name(name): _tensor(stored) for name, stored in found.state_dict_metadata.items()}
    places = dict(_place(*item) for item in found.storage_data.items())
    _check_blocks(tensors, places)
    return Metadata(state_dict_metadata={**tensors}, storage_data=places)


def tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors of `metadata` by name; nothing else is ever saved or read here."""
    return {
        name: stored
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) == ("builtins", "getattr"):  # how Python before 3.11.4 pickles an enum
            return _enum_member
        raise InputError(f"refused to load {module}.{name}, which no checkpoint contains")


class _Index(MetadataIndex):
    """Is hashed only as the name and offset of a block: other contents may take forever."""

    def __hash__(self) -> int:
        if type(self.fqn) is not str or type(self.offset) is not torch.Size:
            raise TypeError("expected the name and offset of a block")
        return hash((self.fqn, self.offset))


def _memory_format(value: Any) -> enum.Enum:
    if type(value) is not int:
        raise TypeError("expected the number of a memory format")
    return metadata._MEM_FORMAT_ENCODING(value)  # noqa: SLF001 (what files name)


def _enum_member(kind: Any, name: Any) -> enum.Enum:
    if kind is not _memory_format or type(name) is not str:
        raise InputError(f"refused to read the attribute {name!r:.100} of {kind!r:.100}")
    return metadata._MEM_FORMAT_ENCODING[name]  # noqa: SLF001


def _layout(name: Any) -> torch.layout:
    if type(name) is not str:
        raise TypeError("expected the name of a layout")
    return torch.serialization._get_layout(name)  # noqa: SLF001


_STAND_INS = {
    (metadata.__name__, "MetadataIndex"): _Index,
    (metadata.__name__, "_MEM_FORMAT_ENCODING"): _memory_format,
    ("torch.serialization", "_get_layout"): _layout,
}


def _name(name: Any) -> str:
    if type(name) is not str or not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError("a tensor has no proper name")
    return name


def _tensor(stored: Any) -> TensorStorageMetadata:
    """A tensor's shape, dtype and blocks, each of a size that a tensor can have."""
    if type(stored) is not TensorStorageMetadata:
        raise TypeError(f"expected a tensor, found {type(stored).__name__}")
    dtype, shape = stored.properties.dtype, _dims(stored.size)
    if dtype not in _DTYPES:
        raise TypeError("a tensor has a dtype that no checkpoint holds")
    # With 1 for 0: other dimensions of an empty tensor must be possible too.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > MOST_BYTES:
        raise ValueError(f"a tensor of shape {shape} is larger than anything")
    chunks = [_chunk(chunk, shape) for chunk in stored.chunks]
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"blocks do not make a tensor of shape {shape}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)


def _chunk(chunk: Any, shape: tuple[int, ...]) -> ChunkStorageMetadata:
    if type(chunk) is not ChunkStorageMetadata:
        raise TypeError(f"expected a block, found {type(chunk).__name__}")
    offsets, sizes = _dims(chunk.offsets), _dims(chunk.sizes)
    ends = [start + size for start, size in zip(offsets, sizes, strict=True)]
    if any(end > size for end, size in zip(ends, shape, strict=True)):
        raise ValueError(f"a block of shape {sizes} at {offsets} is not in a tensor of {shape}")
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def _dims(size: Any) -> tuple[int, ...]:
    if not isinstance(size, torch.Size) or len(size) > MOST_DIMS or any(dim < 0 for dim in size):
        raise ValueError("a tensor or a block has no proper shape")
    return tuple(size)


def _place(index: Any, where: Any) -> tuple[MetadataIndex, _StorageInfo]:
    """Which block is where, in a file of the checkpoint's own folder."""
    if type(index) is not _Index or type(where) is not _StorageInfo:
        raise TypeError("expected the place of a block")
    path, bounds = where.relative_path, (where.offset, where.length)
    if type(path) is not str or Path(path).name != path or not path.isprintable():
        raise ValueError(f"{_name(index.fqn)} is stored at {str(path)[:200]!r}")
    if any(type(bound) is not int or not 0 <= bound <= MOST_BYTES for bound in bounds):
        raise ValueError(f"{_name(index.fqn)} is stored nowhere in {path}")
    if getattr(where, "transform_descriptors", None):
        raise ValueError(f"{_name(index.fqn)} is stored in a form that this program never writes")
    plain = MetadataIndex(_name(index.fqn), torch.Size(_dims(index.offset)))
    return plain, _StorageInfo(path, *bounds)


def _check_blocks(
    tensors: dict[str, TensorStorageMetadata], places: dict[MetadataIndex, _StorageInfo]
) -> None:
    """Raise unless every block has a place of its size, and every place is that of a block."""
    count = 0
    for name, stored in tensors.items():
        for chunk in stored.chunks:
            where = places.get(MetadataIndex(name, chunk.offsets))
            size = math.prod(chunk.sizes) * stored.properties.dtype.itemsize
            if where is None:
                raise ValueError(f"it does not say where {name} is")
            if not size <= where.length <= size + MOST_OVERHEAD:
                raise ValueError(f"{name} has a block of {size} bytes in {where.length}")
            count += 1
    if count != len(places):
        raise ValueError("it tells of places that no tensor has")
