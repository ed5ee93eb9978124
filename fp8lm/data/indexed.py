"""Megatron's indexed files, checked before they are used.

`P.bin` holds the token ids of every document, end to end. `P.idx` holds, little-endian:
magic (9 bytes), version (8), dtype code (1), number of sequences n (8), number of document marks
d (8), n int32 lengths, n int64 byte offsets, d int64 marks: the numbers of the sequences at which
documents begin, and n. `P.json`, which only tools/preprocess_data.py writes, says how they were
made.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fp8lm.data.sidecar import Sidecar, not_a_file, read_sidecar
from fp8lm.runtime.errors import InputError

HEADER = struct.Struct("<9sQBQQ")
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")  # code 1 on
MAGIC = b"MMIDIDX\x00\x00"
BLOCK_TOKENS = 1 << 22
SAMPLED_SEQUENCES, SAMPLED_TOKENS = 256, 4096


@dataclass(frozen=True)
class IndexedFile:
    """What `P.idx` says of `P.bin`, found to agree with it."""

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray  # tokens per sequence, int32
    marks: np.ndarray  # the first sequence of every document, and the number of sequences, int64
    sidecar: Sidecar | None = None

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the lengths: all that an index of samples depends on."""
        return hashlib.sha256(self.lengths.tobytes()).hexdigest()

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """What tells these data from others, for a checkpoint.

        Compare the fields that both sides have: `bin_sha256` is there if preprocessing recorded
        it. `sample_sha256` covers the starts of up to 256 sequences spread over the file.
        """
        sample = hashlib.sha256(np.concatenate(list(self.sample())).tobytes()).hexdigest()
        identity: dict[str, str | int] = {
            "tokens": self.num_tokens,
            "lengths_sha256": self.fingerprint,
            "sample_sha256": sample,
        }
        if self.sidecar is not None and self.sidecar.bin_sha256 is not None:
            identity["bin_sha256"] = self.sidecar.bin_sha256
        return identity

    @cached_property
    def ends(self) -> np.ndarray:
        """The number of tokens up to the end of each sequence, int64."""
        return np.cumsum(self.lengths, dtype=np.int64)

    def sampled_sequences(self) -> np.ndarray:
        """Numbers of up to SAMPLED_SEQUENCES sequences with tokens, spread over the file."""
        filled = np.flatnonzero(self.lengths)
        chosen = np.linspace(0, len(filled) - 1, min(SAMPLED_SEQUENCES, len(filled)))
        return filled[chosen.astype(np.int64)]

    def sample(self) -> Iterator[np.ndarray]:
        """The first SAMPLED_TOKENS ids of each sampled sequence."""
        for number in self.sampled_sequences():
            length = int(self.lengths[number])
            yield self.read(int(self.ends[number]) - length, min(length, SAMPLED_TOKENS))

    def blocks(self) -> Iterator[np.ndarray]:
        """All ids in order, in blocks of BLOCK_TOKENS."""
        for start in range(0, self.num_tokens, BLOCK_TOKENS):
            yield self.read(start, min(BLOCK_TOKENS, self.num_tokens - start))

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from the token `start`; `InputError` where `P.bin` cannot be read."""
        path = self.prefix + ".bin"
        try:  # not a memory map, in which an error of the disk ends the process
            ids = np.fromfile(path, self.dtype, count, offset=start * self.dtype.itemsize)
        except OSError as err:
            raise InputError(f"cannot read {path}: {err.strerror or err}") from None
        if len(ids) < count:
            raise InputError(f"{path} became shorter while it was read: preprocess again")
        return ids

    def document_of(self, token: int) -> int:
        """The document, from 0, that holds the token of this number."""
        sequence = np.searchsorted(self.ends, token, side="right")
        return int(np.searchsorted(self.marks, sequence, side="right")) - 1


def inspect_indexed(prefix: str) -> IndexedFile:
    """Read `prefix.idx` and check it and the size of `prefix.bin`; `InputError` says what is off.

    Megatron-core itself asserts, or reads beyond the end, on such files.
    """
    idx, bin_ = prefix + ".idx", prefix + ".bin"
    for path in (idx, bin_):
        _check_is_file(path, prefix)
    content = _read_index(idx)
    dtype, lengths, pointers, marks = _parse_index(idx, content)
    data = IndexedFile(prefix, dtype, lengths, marks, read_sidecar(prefix))
    _check_index(idx, data, pointers)
    size, expected = os.path.getsize(bin_), data.num_tokens * dtype.itemsize
    if size != expected:
        what = "is truncated" if size < expected else "does not belong to its index"
        raise InputError(
            f"{bin_} {what}: it has {size} bytes and {idx} describes {expected}: preprocess again"
        )
    recorded = data.sidecar and data.sidecar.idx_sha256
    if recorded and hashlib.sha256(content).hexdigest() != recorded:
        raise InputError(
            f"{idx} is not the file that {prefix}.json describes: it is damaged or was replaced: "
            f"preprocess again, or remove {prefix}.json if it is another's"
        )
    return data


def _check_is_file(path: str, prefix: str) -> None:
    """`InputError` for what is missing, and for what is there and may be endless."""
    if os.path.isfile(path):
        return
    if os.path.lexists(path):
        raise InputError(f"data.data_path: {path} is not a regular file: {not_a_file(path)}")
    raise InputError(f"data.data_path: {path} does not exist{_prefix_hint(prefix)}")


def _read_index(idx: str) -> bytes:
    """All of an index whose size is the one that its header gives; no more of any other."""
    try:
        with open(idx, "rb") as stream:
            header = stream.read(HEADER.size)
            expected = _check_header(idx, header, os.fstat(stream.fileno()).st_size)
            content = header + stream.read(expected - len(header))
    except OSError as err:
        raise InputError(f"cannot read {idx}: {err.strerror or err}") from None
    if len(content) < expected:
        raise InputError(f"{idx} became shorter while it was read: preprocess again")
    return content


def _check_header(idx: str, content: bytes, size: int) -> int:
    """`InputError` unless an index of `size` bytes may begin so; the size that it says."""
    if not content.startswith(MAGIC):
        raise InputError(f"{idx} is not an index in Megatron's format")
    if size < HEADER.size:
        raise InputError(f"{idx} is truncated: it has {size} bytes: preprocess again")
    _, version, _, num_sequences, num_marks = HEADER.unpack(content)
    if version != 1:
        raise InputError(f"{idx} has version {version} of the format: only 1 is known")
    expected = HEADER.size + 12 * num_sequences + 8 * num_marks
    if size != expected:
        what = "truncated" if size < expected else "corrupt"
        raise InputError(
            f"{idx} is {what}: it has {size} bytes and should have {expected}: preprocess again"
        )
    return expected


def _parse_index(idx: str, content: bytes) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """dtype, lengths, offsets and document marks of an index of the right size."""
    _, _, code, num_sequences, num_marks = HEADER.unpack_from(content)
    if not 1 <= code <= len(DTYPES):
        raise InputError(f"{idx} is corrupt: token type {code} is unknown")
    dtype = np.dtype(DTYPES[code - 1])
    if dtype.kind not in "iu":
        raise InputError(f"{idx} stores {dtype} values: token ids are integers")
    lengths = np.frombuffer(content, "<i4", num_sequences, HEADER.size)
    pointers = np.frombuffer(content, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    marks = np.frombuffer(content, "<i8", num_marks, HEADER.size + 12 * num_sequences)
    return dtype, lengths, pointers, marks


def _check_index(idx: str, data: IndexedFile, pointers: np.ndarray) -> None:
    """`InputError` unless lengths, offsets and marks agree with each other."""
    if data.lengths.min(initial=0) < 0 or not np.array_equal(
        (data.ends - data.lengths) * np.int64(data.dtype.itemsize), pointers
    ):
        raise InputError(f"{idx} is corrupt: lengths and offsets disagree: preprocess again")
    marks = data.marks
    rises = len(marks) and marks[0] == 0 and marks[-1] == len(data.lengths)
    # Documents without sequences, which Megatron may write, repeat a mark.
    if not rises or (np.diff(marks) < 0).any():
        raise InputError(f"{idx} is corrupt: documents and sequences disagree: preprocess again")
    if not data.num_tokens:
        raise InputError(f"{idx} describes no tokens: the corpus was empty")


def _prefix_hint(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")):
        return ": give the prefix, without .bin or .idx"
    if os.path.isfile(prefix + "_text_document.idx"):
        return f": did you mean {prefix}_text_document?"
    return ": make it with tools/preprocess_data.py"
