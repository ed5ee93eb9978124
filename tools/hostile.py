"""Checkpoints damaged at random, or rewritten by somebody who also writes their checksums anew.

Each of REWRITTEN and SPECIAL is a change of a checkpoint's folder, by a name that says what it is.
None of them may be loaded, stop a resume from an older checkpoint, or take long.
"""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from fp8lm.checkpoint.checksums import CHECKSUMS, checksums_text, file_digest
from fp8lm.checkpoint.facts import BATCH_GROWTH
from fp8lm.checkpoint.metadata import tensor_entries

Change = Callable[[Path], Any]  # of a checkpoint's folder, or of a file in it
FACTS = ("common.json", ".metadata", CHECKSUMS)


def sign(folder: Path) -> None:
    """Write the checksums anew, as someone who changes a checkpoint on purpose would."""
    names = [path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS]
    digests = {name: file_digest(folder / name) for name in names}
    (folder / CHECKSUMS).write_text(checksums_text(digests))


def flip_bit(path: Path, rng: random.Random) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def text(content: str) -> Change:
    """Another common.json."""
    return lambda folder: (folder / "common.json").write_text(content)


def facts(**changes: Any) -> Change:
    """Other facts."""

    def change(folder: Path) -> None:
        common = json.loads((folder / "common.json").read_text())
        (folder / "common.json").write_text(json.dumps({**common, **changes}))

    return change


def consumed_beyond_any_batch(folder: Path) -> None:
    """As many samples as no run of so many iterations and of such batches has read."""
    common = json.loads((folder / "common.json").read_text())
    batch = max(common["batch_size"], common["config"].get("train", {}).get("global_batch_size", 1))
    facts(consumed_samples=(BATCH_GROWTH + 1) * common["iteration"] * batch)(folder)


def metadata(change: Callable[[Metadata], Any]) -> Change:
    """Another .metadata."""

    def rewrite(folder: Path) -> None:
        found = pickle.loads((folder / ".metadata").read_bytes())
        replaced = change(found)
        (folder / ".metadata").write_bytes(pickle.dumps(found if replaced is None else replaced))

    return rewrite


def shape(*sizes: int) -> Change:
    """All tensors of one shape."""

    def change(found: Metadata) -> None:
        for stored in tensor_entries(found).values():
            stored.size = torch.Size(sizes)
            zeros = torch.Size([0] * len(sizes))
            stored.chunks = [ChunkStorageMetadata(zeros, torch.Size(sizes))]

    return metadata(change)


def renamed(name: Any) -> Change:
    """One tensor under another name."""

    def change(found: Metadata) -> None:
        tensors: dict[Any, Any] = found.state_dict_metadata
        tensors[name] = tensors.popitem()[1]

    return metadata(change)


def dtype(value: torch.dtype) -> Change:
    """All tensors of one dtype."""

    def change(found: Metadata) -> None:
        for stored in tensor_entries(found).values():
            stored.properties.dtype = value

    return metadata(change)


def chunks(**values: int) -> Change:
    """All blocks with another offset or size."""

    def change(found: Metadata) -> None:
        for stored in tensor_entries(found).values():
            for chunk in stored.chunks:
                for name, value in values.items():
                    setattr(chunk, name, torch.Size([value] * len(chunk.sizes)))

    return metadata(change)


def places(**values: Any) -> Change:
    """All blocks elsewhere in their file."""

    def change(found: Metadata) -> None:
        for where in found.storage_data.values():
            for name, value in values.items():
                setattr(where, name, value)

    return metadata(change)


def replaced(name: str, make: Change) -> Change:
    """A file replaced by something special."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def named(name: str, make: Change | None = None) -> Change:
    """One more name in the checksums, of something that `make` makes."""

    def change(folder: Path) -> None:
        if make is not None:
            make(folder / name)
        with (folder / CHECKSUMS).open("a") as file:
            file.write(f"{'0' * 64}  {name}\n")

    return change


def sparse(path: Path) -> None:
    """A file that claims more bytes than anybody would read."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), 2**43)


def to_zero(path: Path) -> None:
    """The device that never ends."""
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    """More than such a file may have, and nested as deep."""
    path.write_bytes(b"[" * (2**24 + 1))


def pickled(data: bytes) -> Change:
    """These bytes as .metadata."""
    return lambda folder: (folder / ".metadata").write_bytes(data)


def nested_blocks(depth: int) -> bytes:
    """Places of blocks, each named by the one before twice: a hash of the last is 2^depth."""
    index = MetadataIndex("w", torch.Size([0]))
    for _ in range(depth):
        outer = object.__new__(MetadataIndex)
        outer.__dict__.update(fqn=index, offset=index, index=None)
        index = outer
    return pickle.dumps(Metadata({}, storage_data=Keyed([(index, 1)])))


class Keyed(dict):
    """A dict to be: pickled with keys that are not hashed here."""

    def __init__(self, entries: list[tuple[Any, Any]]) -> None:
        super().__init__()
        self._entries = entries

    def __reduce__(self) -> tuple:
        return dict, (), None, None, iter(self._entries)


WRONG_COUNTS: list[Any] = [-1, True, 1.5, "1", [], 2**53, 10**30]
WRONG: list[Any] = [None, -1, True, 1.5, "1", [], {}, 2**53, 10**30]
WRONG_CONFIGS: list[Any] = [[], "x", 7, {"train": 7}]
WRONG_LOSSES: list[Any] = [[], {}, 7, {"mean": "x"}]
# Changes of the facts and of where tensors are; the checksums are right afterwards.
REWRITTEN = {
    **{f"{key} {value!r:.12}": facts(**{key: value}) for key in ("iteration",) for value in WRONG},
    **{
        f"{key} {value!r:.12}": facts(**{key: value})
        for key in ("consumed_samples", "batch_size", "skipped_samples", "rollbacks")
        for value in WRONG_COUNTS
    },
    "consumed less than iterations": facts(consumed_samples=3),
    "consumed more than batches": facts(consumed_samples=10**12),
    "consumed more than larger batches": consumed_beyond_any_batch,
    "skipped without rollbacks": facts(skipped_samples=8),
    "skipped more than a rollback": facts(rollbacks=1, skipped_samples=2**52),
    **{f"config {value!r}": facts(config=value) for value in WRONG_CONFIGS},
    **{f"losses {value!r}": facts(losses=value) for value in WRONG_LOSSES},
    "a tokenizer of many files": facts(
        tokenizer={
            "identity": {"tokenizer_type": "NullTokenizer", "vocab_size": 64},
            "files": ["common.json"] * 100_000,
        }
    ),
    "losses not finite": text('{"losses": {"mean": 1e999}}'),
    "version 0": facts(format_version=0),
    "version true": facts(format_version=True),
    "version text": facts(format_version="9"),
    "escape codes": facts(fp8lm_version="\x1b[2J"),
    "surrogate": text('{"fp8lm_version": "\\ud800"}'),
    "surrogate key": facts(**{"\ud800": 1}),
    "no number": text('{"x": NaN}'),
    "infinite number": text('{"iteration": 1e999}'),
    "long number": text('{"iteration": ' + "9" * 100_000 + "}"),
    "deep lists": text("[" * 100_000),
    "deep objects": text('{"a":' * 50_000 + "1" + "}" * 50_000),
    "deep fact": facts(extra=json.loads("[" * 100 + "]" * 100)),
    "a list": text("[1, 2]"),
    "nothing": text(""),
    "not UTF-8": lambda folder: (folder / "common.json").write_bytes(b'{"a": "\xff"}'),
    "shape 2**62": shape(2**62),
    "shape 2**31 squared": shape(2**31, 2**31),
    "shape of 0 and 2**62": shape(2**62, 0),
    "shapes 2**40 and 0": shape(2**40, 2**40, 0),
    "shape negative": shape(-4, -4),
    "shape of many": shape(*[1] * 200),
    "shape 3": shape(3),
    "block at 2**62": chunks(offsets=2**62),
    "block at -1": chunks(offsets=-1),
    "block of 2**62": chunks(sizes=2**62),
    "block of -1": chunks(sizes=-1),
    "block of 0": chunks(sizes=0),
    "offset 2**62": places(offset=2**62),
    "offset -1": places(offset=-1),
    "offset text": places(offset="0"),
    "length 2**62": places(length=2**62),
    "length -5": places(length=-5),
    "length 0": places(length=0),
    "length of bytes more": places(length=2**20),
    "in another folder": places(relative_path="../../iter_0000001/__0_0.distcp"),
    "in no file": places(relative_path=""),
    "in the facts": places(relative_path="common.json"),
    "in a list": places(relative_path=["__0_0.distcp"]),
    "in a foreign form": places(transform_descriptors=["zstd"]),
    "no tensors": metadata(lambda found: found.state_dict_metadata.clear()),
    "no places": metadata(lambda found: found.storage_data.clear()),
    "tensors are a list": metadata(lambda found: setattr(found, "state_dict_metadata", [1])),
    "name is a number": renamed(7),
    "name with a newline": renamed("a\nb"),
    "a dtype of words": dtype(torch.complex128),
    "metadata of text": metadata(lambda found: "text"),
    "metadata of deep tuples": lambda folder: (folder / ".metadata").write_bytes(
        b"\x80\x04)" + b"\x85" * 100_000 + b"."
    ),
    "a key of deep tuples": pickled(b"\x80\x04})" + b"\x85" * 200_000 + b"K\x01s."),
    "a key of shared tuples": pickled(
        b"\x80\x04})\x94" + b"".join(b"h%c\x86\x94" % n for n in range(60)) + b"K\x01s."
    ),
    "a block of shared blocks": pickled(nested_blocks(60)),
    "a layout of deep tuples": pickled(
        b"\x80\x04\x8c\x13torch.serialization\x8c\x0b_get_layout\x93)"
        + b"\x85" * 200_000
        + b"\x85R."
    ),
    "a memo for billions": pickled(b"\x80\x04Nr\xff\xff\xff\x7f."),
    "a long number in a pickle": pickled(b"\x80\x04\x8b\xff\xff\xff\x7f."),
    "metadata cut": lambda folder: os.truncate(folder / ".metadata", 100),
}
# Changes of what files are; whoever made them could not, or need not, write right checksums.
SPECIAL = {
    **{f"{name} a FIFO": replaced(name, os.mkfifo) for name in (*FACTS, "__0_0.distcp")},
    **{f"{name} endless": replaced(name, to_zero) for name in (*FACTS, "__0_0.distcp")},
    **{f"{name} a folder": replaced(name, os.mkdir) for name in (*FACTS, "__0_0.distcp")},
    **{f"{name} huge": replaced(name, huge) for name in ("common.json", CHECKSUMS)},
    **{f"{name} sparse": replaced(name, sparse) for name in (*FACTS, "__0_0.distcp")},
    "a FIFO is named": named("pipe", os.mkfifo),
    "the endless device is named": named("zero", to_zero),
    "a sparse file is named": named("sparse", sparse),
    "the folder is named": named("."),
    "the folder above is named": named(".."),
    "the checksums are named": named(CHECKSUMS),
    "a name is too long": named("x" * 300),
    "a name with escape codes": named("\x1b[2J"),
    "a name twice": named("common.json"),
    "a name with NUL": named("a\0b"),
}
