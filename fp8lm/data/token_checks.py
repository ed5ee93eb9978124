"""Do token files belong to a tokenizer? What is checked before a run starts.

The identity that `P.json` records must be the tokenizer's; data written by Megatron has none. Every
id must lie inside the vocabulary. Of a run's files with at most SCANNED_TOKENS tokens together all
ids are read, and the digest in `P.json` is compared; of larger ones the range that `P.json` records
counts, or, where it records none, a sample. What this misses is found in the batch that holds it
(checked_dataset.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from fp8lm.data.identity import NAMES, describe, differences
from fp8lm.data.indexed import IndexedFile
from fp8lm.data.sidecar import Sidecar
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.runtime.errors import InputError

SCANNED_TOKENS = 1 << 27
CURE = "use the tokenizer that made the data, or preprocess again"


def check_tokenizer(data: IndexedFile, tokenizer: Tokenizer, other_tokens: int = 0) -> None:
    """Raise `InputError` when the data was not made with this tokenizer.

    `other_tokens` are those of the run's other files: every process reads all of them.
    """
    if data.sidecar is not None:
        _check_identity(data, data.sidecar, tokenizer)
    check_ids(data, tokenizer.vocab_size, other_tokens)


def check_ids(data: IndexedFile, vocab_size: int, other_tokens: int = 0) -> None:
    """Raise `InputError` for ids outside the vocabulary, and for a file that was replaced."""
    if data.num_tokens + other_tokens <= SCANNED_TOKENS:
        _scan(data, vocab_size)
    elif any(_outside(ids, vocab_size) is not None for ids in _evidence(data)):
        _refuse_first_outside(data, vocab_size)


def check_document_ends(data: IndexedFile, eod: int) -> None:
    """Raise `InputError` where no document ends with `eod`: then nothing tells where one ends.

    What `P.json` records counts; of files without it some documents are read.
    """
    if data.sidecar is not None and data.sidecar.append_eod is not None:
        marked = data.sidecar.append_eod
    else:
        last = (int(data.ends[number]) - 1 for number in data.sampled_sequences())
        marked = any(int(data.read(place, 1)[0]) == eod for place in last)
    if not marked:
        raise InputError(
            f"{data.prefix} has no end-of-document tokens (id {eod}), by which "
            "data.reset_position_ids and data.reset_attention_mask tell documents apart: "
            "preprocess again with --append-eod, or drop these keys"
        )


def _evidence(data: IndexedFile) -> Iterable[np.ndarray]:
    """Of a large file the smallest and largest id if they are recorded, else a sample."""
    made = data.sidecar
    if made is None or made.min_id is None or made.max_id is None:
        return data.sample()
    return [np.array([made.min_id, made.max_id])]


def _check_identity(data: IndexedFile, made: Sidecar, tokenizer: Tokenizer) -> None:
    if not any(made.tokenizer.get(name) is not None for name in NAMES):
        raise InputError(
            f"{data.prefix}.json does not name a tokenizer: remove it or preprocess again"
        )
    if found := differences(made.tokenizer, tokenizer.identity):
        raise InputError(
            f"{data.prefix} was tokenized with {describe(made.tokenizer)}, and the config's "
            f"tokenizer is {describe(tokenizer.identity)}, which differs in "
            f"{' and '.join(found)}: {CURE}"
        )
    if made.bos is not None and made.bos != tokenizer.bos:
        raise InputError(
            f"{data.prefix} begins its documents with id {made.bos}, and the config's tokenizer "
            f"has {tokenizer.bos} for that: {CURE}"
        )
    if made.append_eod and made.tokenizer.get("eod") is None:
        _check_last_ids(data, tokenizer.eod)


def _check_last_ids(data: IndexedFile, eod: int) -> None:
    """Of data whose end-of-document id is not recorded: some documents do end with it."""
    for number in data.sampled_sequences():
        last = int(data.read(int(data.ends[number]) - 1, 1)[0])
        if last != eod:
            raise InputError(
                f"{data.prefix} ends its documents with id {last}, and the config's tokenizer "
                f"with {eod}: {CURE}"
            )


def _scan(data: IndexedFile, vocab_size: int) -> None:
    """Read all ids: each inside the vocabulary, all together those that were written."""
    recorded = data.sidecar and data.sidecar.bin_sha256
    digest = hashlib.sha256()
    for block, ids in enumerate(data.blocks()):
        if _outside(ids, vocab_size) is not None:
            _refuse_first_outside(data, vocab_size, block)
        if recorded:
            digest.update(ids.data)
    if recorded and digest.hexdigest() != recorded:
        raise InputError(
            f"{data.prefix}.bin is not the file that {data.prefix}.json describes: it is damaged "
            f"or was replaced: preprocess again, or remove {data.prefix}.json if it is another's"
        )


def _refuse_first_outside(data: IndexedFile, vocab_size: int, first_block: int = 0) -> None:
    """Find the first id outside the vocabulary, from a block on, and name it."""
    seen = 0
    for block, ids in enumerate(data.blocks()):
        if block >= first_block and (place := _outside(ids, vocab_size)) is not None:
            raise InputError(
                f"{data.prefix}.bin holds token id {ids[place]} in document "
                f"{data.document_of(seen + place)} (from 0, token {seen + place} of the file), "
                f"outside the tokenizer's vocabulary of {vocab_size}: {CURE}"
            )
        seen += len(ids)


def _outside(ids: np.ndarray, vocab_size: int) -> int | None:
    """The first place of an id outside the vocabulary."""
    if not len(ids) or (ids.min() >= 0 and ids.max() < vocab_size):
        return None
    return int(np.argmax((ids < 0) | (ids >= vocab_size)))
