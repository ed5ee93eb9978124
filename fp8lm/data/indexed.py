"""Megatron's indexed files, checked before they are used.

`P.bin` holds the token ids of every document, end to end. `P.idx` holds, little-endian:
magic (9 bytes), version (8), dtype code (1), number of sequences n (8), number of document marks
d (8), n int32 lengths, n int64 byte offsets, d int64 marks. `P.json`, which only
tools/preprocess_data.py writes, names the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fp8lm.data.tokenizer import Tokenizer
from fp8lm.errors import InputError

HEADER = struct.Struct("<9sQBQQ")
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")  # code 1 on
MAGIC = b"MMIDIDX\x00\x00"
SAMPLED_DOCUMENTS, SAMPLED_TOKENS = 256, 4096


@dataclass(frozen=True)
class IndexedFile:
    """What `P.idx` says of `P.bin`, found to agree with it."""

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray  # tokens per sequence, int32

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the lengths: all that an index of samples depends on."""
        return hashlib.sha256(self.lengths.tobytes()).hexdigest()


def inspect_indexed(prefix: str) -> IndexedFile:
    """Read `prefix.idx` and check it and the size of `prefix.bin`; `InputError` says what is off.

    Megatron-core itself asserts, or reads beyond the end, on such files.
    """
    idx, bin_ = prefix + ".idx", prefix + ".bin"
    for path in (idx, bin_):
        if not os.path.isfile(path):
            raise InputError(f"data.data_path: {path} does not exist{_prefix_hint(prefix)}")
    dtype, lengths, pointers, marks = _read_index(idx)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    starts = ends - lengths * np.int64(dtype.itemsize)
    if lengths.min(initial=0) < 0 or not np.array_equal(starts, pointers):
        raise InputError(f"{idx} is corrupt: lengths and offsets disagree: preprocess again")
    if not len(marks) or marks[-1] != len(lengths):
        raise InputError(f"{idx} is corrupt: documents and sequences disagree: preprocess again")
    expected = int(ends[-1]) if len(ends) else 0
    if expected == 0:
        raise InputError(f"{idx} describes no tokens: the corpus was empty")
    size = os.path.getsize(bin_)
    if size != expected:
        what = "is truncated" if size < expected else "does not belong to its index"
        raise InputError(
            f"{bin_} {what}: it has {size} bytes and {idx} describes {expected}: preprocess again"
        )
    return IndexedFile(prefix, dtype, lengths)


def _read_index(idx: str) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """dtype, lengths, offsets and document marks of an index of the right size."""
    size = os.path.getsize(idx)
    with open(idx, "rb") as stream:
        header = stream.read(HEADER.size)
        if not header.startswith(MAGIC):
            raise InputError(f"{idx} is not an index in Megatron's format")
        if len(header) < HEADER.size:
            raise InputError(f"{idx} is truncated: it has {size} bytes: preprocess again")
        _, version, code, num_sequences, num_marks = HEADER.unpack(header)
        if version != 1:
            raise InputError(f"{idx} has version {version} of the format: only 1 is known")
        expected = HEADER.size + 12 * num_sequences + 8 * num_marks
        if size != expected:
            what = "truncated" if size < expected else "corrupt"
            raise InputError(
                f"{idx} is {what}: it has {size} bytes and should have {expected}: preprocess again"
            )
        lengths = np.fromfile(stream, "<i4", num_sequences)
        pointers = np.fromfile(stream, "<i8", num_sequences)
        marks = np.fromfile(stream, "<i8", num_marks)
    if not 1 <= code <= len(DTYPES):
        raise InputError(f"{idx} is corrupt: token type {code} is unknown")
    dtype = np.dtype(DTYPES[code - 1])
    if dtype.kind not in "iu":
        raise InputError(f"{idx} stores {dtype} values: token ids are integers")
    return dtype, lengths, pointers, marks


def _prefix_hint(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")):
        return ": give the prefix, without .bin or .idx"
    if os.path.isfile(prefix + "_text_document.idx"):
        return f": did you mean {prefix}_text_document?"
    return ": make it with tools/preprocess_data.py"


def check_tokenizer(data: IndexedFile, tokenizer: Tokenizer) -> None:
    """Raise `InputError` when the data was not made with this tokenizer.

    By the identity in `P.json` where there is one. Data written by Megatron has none: then, and
    in any case, the ids of a sample of documents must lie inside the vocabulary.
    """
    made_with = _recorded_tokenizer(data.prefix + ".json")
    if made_with is not None and made_with != tokenizer.identity:
        raise InputError(
            f"{data.prefix} was tokenized with {_describe(made_with)}, and the config's tokenizer "
            f"is {_describe(tokenizer.identity)}: use the tokenizer that made the data, or "
            "preprocess again"
        )
    low, high = _sampled_range(data)
    if low < 0 or high >= tokenizer.vocab_size:
        raise InputError(
            f"{data.prefix}.bin holds token id {low if low < 0 else high}, outside the "
            f"tokenizer's vocabulary of {tokenizer.vocab_size}: use the tokenizer that made the "
            "data, or preprocess again"
        )


def _recorded_tokenizer(path: str) -> dict | None:
    try:
        return dict(json.loads(Path(path).read_bytes())["tokenizer"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} does not name a tokenizer: remove it or preprocess again"
        ) from None


def _describe(identity: dict) -> str:
    digest = identity.get("model_sha256")
    model = f", model sha256 {digest[:12]}" if digest else ""
    return f"{identity.get('tokenizer_type')} (vocabulary {identity.get('vocab_size')}{model})"


def _sampled_range(data: IndexedFile) -> tuple[int, int]:
    """Smallest and largest id at the start of documents spread evenly over the file."""
    tokens = np.memmap(data.prefix + ".bin", dtype=data.dtype, mode="r")
    starts = np.cumsum(data.lengths, dtype=np.int64) - data.lengths
    chosen = np.unique(np.linspace(0, len(starts) - 1, SAMPLED_DOCUMENTS).astype(np.int64))
    parts = [
        tokens[starts[i] : starts[i] + min(int(data.lengths[i]), SAMPLED_TOKENS)] for i in chosen
    ]
    ids = np.concatenate(parts)
    # Documents may be empty; the file is not.
    return (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
