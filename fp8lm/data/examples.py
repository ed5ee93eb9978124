"""Where examples come from: preprocessed files, or lines of JSON that are tokenized at the start.

tools/preprocess_data.py --format chat writes `P_chat_document.{bin,idx,json}` in Megatron's format,
and beside it `P_chat_mask.{bin,idx,json}`, one byte a token: 1 where it is part of an answer. A
document has one sequence; with --format preference two, what was chosen and what was rejected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from fp8lm.data.conversations import ExampleEncoder, ExampleFormat, MaskedTokens
from fp8lm.data.documents import BadDocument, SkippedDocuments, is_json_name, read_records
from fp8lm.data.indexed import inspect_indexed
from fp8lm.data.token_checks import check_ids, check_tokenizer
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.runtime.errors import InputError

SEQUENCES = {"chat": 1, "preference": 2}  # of a document
DOCUMENT, MASK = "_document", "_mask"  # ends of prefixes


@dataclass(frozen=True)
class Examples:
    """Documents of `format` from one `source`; `lengths` [sequences] are in tokens.

    `read` gives a sequence by its number, `place` says where a document is. `skipped` were left
    out when they were read.
    """

    source: str
    format: ExampleFormat
    lengths: np.ndarray
    read: Callable[[int], MaskedTokens]
    place: Callable[[int], str]
    skipped: SkippedDocuments = field(default_factory=SkippedDocuments)

    @property
    def per_document(self) -> int:
        """Sequences of a document."""
        return SEQUENCES[self.format]

    @property
    def num_documents(self) -> int:
        """Examples."""
        return len(self.lengths) // self.per_document

    @cached_property
    def sizes(self) -> np.ndarray:
        """Tokens that a model reads of each document: all but every sequence's last one."""
        return (self.lengths - 1).reshape(-1, self.per_document).sum(axis=1)

    def sequences(self, document: int) -> list[MaskedTokens]:
        """The sequences of a document."""
        first = document * self.per_document
        return [self.read(number) for number in range(first, first + self.per_document)]


def is_json_file(path: str) -> bool:
    """Whether an entry of `data.data_path` is a file of JSON lines, and no prefix."""
    return is_json_name(Path(path))


def mask_prefix(prefix: str) -> str:
    """The prefix of the masks that go with the documents of `prefix`."""
    return prefix.removesuffix(DOCUMENT) + MASK


def read_json_examples(path: str, encoder: ExampleEncoder, *, skip_bad: bool) -> Examples:
    """Tokenize a file of JSON lines into memory.

    `InputError` with file and line for one that is no example, unless they are skipped.
    """
    file, skipped = Path(path), SkippedDocuments()
    if not file.is_file():
        raise InputError(f"data.data_path: {path} does not exist, or is no file")
    sequences: list[MaskedTokens] = []
    places: list[str] = []
    for record in read_records([file], input_format="jsonl"):
        try:
            sequences += encoder.encode(record)
        except BadDocument as error:
            if not skip_bad:
                raise
            skipped.add(str(error))
        else:
            places.append(record.place)
    if not places:
        why = f": {skipped}" if skipped.count else ""
        raise InputError(f"data.data_path: {path} has no examples{why}")
    lengths = np.array([len(sequence.ids) for sequence in sequences])
    return Examples(
        path, encoder.format, lengths, sequences.__getitem__, places.__getitem__, skipped
    )


def open_indexed_examples(prefix: str, form: ExampleFormat, tokenizer: Tokenizer) -> Examples:
    """Preprocessed examples; `InputError` if they are not of this format, or of another tokenizer.

    Reads sequences as they are needed.
    """
    documents = inspect_indexed(prefix)
    sidecar = documents.sidecar
    found = "text" if sidecar is None else sidecar.format
    if found != form:
        raise InputError(
            f"data.data_path: {prefix} holds {found} documents, and train.objective wants "
            f"{form}: preprocess with --format {form}, or give a file of JSON lines"
        )
    check_tokenizer(documents, tokenizer)
    masks = inspect_indexed(mask_prefix(prefix))
    if not np.array_equal(masks.lengths, documents.lengths):
        raise InputError(f"{mask_prefix(prefix)} is not the mask of {prefix}: preprocess again")
    check_ids(masks, 2)
    if documents.lengths.min(initial=2) < 2:
        raise InputError(f"{prefix}.idx has a sequence of less than two tokens: preprocess again")
    if (np.diff(documents.marks) != SEQUENCES[form]).any():
        raise InputError(f"{prefix}.idx does not have {SEQUENCES[form]} sequences per document")

    def read(number: int) -> MaskedTokens:
        length = int(documents.lengths[number])
        start = int(documents.ends[number]) - length
        ids = documents.read(start, length).astype(np.int64)
        return MaskedTokens(ids, masks.read(start, length))

    def place(document: int) -> str:
        return f"{prefix}, document {document} (from 0)"

    return Examples(prefix, form, documents.lengths.astype(np.int64), read, place)


def data_identity(path: str) -> dict[str, str | int]:
    """What tells the data of an entry of `data.data_path` from others, for a checkpoint."""
    if not is_json_file(path):
        return inspect_indexed(path).identity
    try:
        with open(path, "rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
