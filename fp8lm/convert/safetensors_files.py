"""Folders of safetensors files: written tensor by tensor, read row by row.

    8 bytes    length of the header (little-endian)
    header     JSON: {name: {dtype, shape, data_offsets: [begin, end]}}
    data       the tensors' bytes, one after the other

The library's `save_file` takes a whole file's tensors at once; a model larger than memory needs one
at a time, and each in blocks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import create, write_whole

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
_OF_NAMES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write; `blocks` gives its elements in their order, in parts of any shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(tensors: Iterable[OutputTensor], largest: int) -> dict[str, list[OutputTensor]]:
    """The tensors of each file, of at most `largest` bytes unless one alone has more."""
    files: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.nbytes > largest:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": held
        for number, held in enumerate(files, 1)
    }


def write_file(path: Path, tensors: list[OutputTensor], progress: Callable[[int], object]) -> None:
    """Write one file aside and rename it; `progress` is told the bytes that were written."""
    aside = path.with_name(f"{path.name}.part")
    aside.unlink(missing_ok=True)
    with os.fdopen(create(aside), "wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            written = 0
            for block in tensor.blocks():
                data = block.contiguous().view(-1).view(torch.uint8).numpy()
                file.write(data.data)
                written += len(data)
                progress(len(data))
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes of {tensor.nbytes}")
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def _header(tensors: list[OutputTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        entries[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_index(folder: Path, files: Mapping[str, list[OutputTensor]]) -> None:
    """Say which file holds which tensor, where there is more than one file."""
    if len(files) == 1:
        return
    tensors = [tensor for held in files.values() for tensor in held]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {tensor.name: name for name, held in files.items() for tensor in held},
    }
    write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")


@dataclass(frozen=True)
class InputTensor:
    """Where a tensor is, its dtype and shape."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsFolder:
    """The tensors of a folder, by name; `InputError` for a file that is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files_of(folder)
        self.tensors = {t.name: t for file in self.files for t in _tensors_of(file)}

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` (default: all) of a tensor."""
        tensor = self.tensors[name]
        # Opened anew each time: what the library maps of a file stays in memory until it is closed.
        try:
            with safe_open(tensor.file, framework="pt") as file:
                if not tensor.shape:
                    return file.get_tensor(name)
                return file.get_slice(name)[start:stop].clone()
        except (SafetensorError, OSError) as error:
            raise _damaged(tensor.file, error) from error


def _files_of(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        try:
            names = json.loads((folder / INDEX).read_text())["weight_map"].values()
            files = [folder / Path(name).name for name in sorted(set(names))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / INDEX} does not name the files of tensors") from error
        for file in files:
            if not file.is_file():
                raise InputError(f"{folder} is incomplete: {INDEX} names {file.name}: not there")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    hint = ""
    if next(folder.glob("pytorch_model*.bin"), None) is not None:
        hint = ": pickled weights are not read, save them with safe_serialization=True"
    raise InputError(f"{folder} holds no {SINGLE} and no {INDEX}{hint}")


def _tensors_of(path: Path) -> Iterator[InputTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                found = file.get_slice(name)
                dtype = _OF_NAMES.get(found.get_dtype())
                if dtype is None:
                    raise InputError(f"{path}: {name} has dtype {found.get_dtype()}")
                yield InputTensor(path, name, dtype, tuple(found.get_shape()))
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged or truncated: {str(error)[:200]}")
