"""Documents to token ids, in worker processes, in the order of the input.

Batches of records go to the workers and come back through a bounded window, so that memory does
not grow with the corpus and the result does not depend on the number of workers.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import active_children, get_context, parent_process
from typing import Literal

import numpy as np

from fp8lm.data.chat import ChatTemplate
from fp8lm.data.conversations import ExampleEncoder, ExampleFormat
from fp8lm.data.documents import BadDocument, Record, parse_record
from fp8lm.data.tokenizer import Tokenizer, load_tokenizer
from fp8lm.runtime.errors import InputError, RunFailed

DocumentFormat = Literal["text"] | ExampleFormat
MASK = "mask"
BATCH_BYTES = 1 << 18
WORKER_DIED = (
    "a worker process died: killed, or out of memory, of which fewer --workers need less; nothing "
    "is written"
)


@dataclass(frozen=True)
class EncodeSettings:
    """All a worker needs: the tokenizer's three arguments, and how to treat a document.

    With `skip_bad` a bad document is passed on as the reason why it is left out. With a `format`
    that is not text the documents are examples, which `template` renders; `keys` do not count then.
    """

    tokenizer_type: str
    tokenizer_model: str | None
    vocab_size: int | None
    keys: tuple[str, ...]
    append_eod: bool
    dtype: str
    prepend_bos: bool = False
    parse_special_tokens: bool = False
    skip_bad: bool = False
    format: DocumentFormat = "text"
    template: ChatTemplate | None = None


@dataclass(frozen=True)
class EncodedDocument:
    """Token ids of one document by key, and how many bytes of the input were read for it.

    `fault` says why a bad document has none. An example has its ids under the name of its format
    and its mask under `MASK`, both of sequences of these `lengths`.
    """

    ids: dict[str, np.ndarray]
    num_bytes: int
    fault: str | None = None
    lengths: list[int] | None = None


Encoded = list[EncodedDocument]


def encode_records(
    records: Iterable[Record], settings: EncodeSettings, workers: int
) -> Generator[EncodedDocument]:
    """Yield every record's token ids, in order; a bad record raises `InputError` in its turn.

    A document without text has no ids, not even the end of document. Close the generator to stop
    the workers early. `RunFailed` where a worker dies.
    """
    encode = partial(_encode_batch, settings)
    if workers == 1:
        for batch in _batched(records):
            yield from encode(batch)
        return
    # Spawned rather than forked: the same on every system, and the caller may have threads.
    others = active_children()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_follow_parent)
    try:
        pending: deque[Future[Encoded]] = deque()
        for batch in _batched(records):
            pending.append(_submit(pool, encode, batch))
            if len(pending) > 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BaseException as error:
        # Their results are not needed, and a long document takes minutes.
        for worker in active_children():
            if worker not in others:
                worker.kill()
        if isinstance(error, BrokenProcessPool):
            raise RunFailed(WORKER_DIED) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor, encode: Callable[[list[Record]], Encoded], batch: list[Record]
) -> Future[Encoded]:
    """Hand out a batch, for which a worker may have to be started."""
    try:
        with _interrupts_held():
            return pool.submit(encode, batch)
    except (ValueError, OSError) as err:
        if getattr(err, "errno", None) in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
            raise
        # A pool that finds out in this moment that a worker is dead closes what the new one needs.
        raise RunFailed(WORKER_DIED) from None


def _batched(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record.data)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Leave Ctrl-C, which reaches every process of the terminal, to this one.

    A process started inside never sees it, not even while its interpreter is starting, before it
    could ignore the signal itself: a blocked signal stays blocked. Here it arrives at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_parent() -> None:
    """End this process when its parent ends."""

    def end_with_parent() -> None:
        # A killed parent closes no queue: without this its workers would wait for ever.
        if (parent := parent_process()) is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode_batch(settings: EncodeSettings, batch: list[Record]) -> Encoded:
    tokenizer = _loaded_tokenizer(
        settings.tokenizer_type, settings.tokenizer_model, settings.vocab_size
    )
    return [_encode(tokenizer, settings, record) for record in batch]


@lru_cache(maxsize=1)
def _loaded_tokenizer(kind: str, model: str | None, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of this process, loaded at the first batch."""
    return load_tokenizer(kind, model, vocab_size)


def _encode(tokenizer: Tokenizer, settings: EncodeSettings, record: Record) -> EncodedDocument:
    try:
        if settings.format != "text":
            return _encode_example(tokenizer, settings, record, settings.format)
        texts = parse_record(record, settings.keys)
        ids_by_key = {key: _ids_of(tokenizer, settings, text) for key, text in texts.items()}
    except InputError as err:
        bad = isinstance(err, BadDocument)
        fault = str(err) if bad else f"{record.place}: {err}"
        if not settings.skip_bad:
            raise InputError(fault) from None
        return EncodedDocument({}, record.read_bytes, fault)
    return EncodedDocument(ids_by_key, record.read_bytes)


def _encode_example(
    tokenizer: Tokenizer, settings: EncodeSettings, record: Record, form: ExampleFormat
) -> EncodedDocument:
    sequences = ExampleEncoder(tokenizer, settings.template, form).encode(record)
    ids, mask = (np.concatenate(arrays) for arrays in zip(*sequences, strict=True))
    found = {form: ids.astype(settings.dtype), MASK: mask}
    return EncodedDocument(found, record.read_bytes, None, [len(each.ids) for each in sequences])


def _ids_of(tokenizer: Tokenizer, settings: EncodeSettings, text: str) -> np.ndarray:
    ids = tokenizer.tokenize(text, settings.parse_special_tokens)
    if ids and settings.prepend_bos:
        assert tokenizer.bos is not None  # the command refuses a tokenizer without one
        ids.insert(0, tokenizer.bos)
    if ids and settings.append_eod:
        ids.append(tokenizer.eod)
    return np.array(ids, dtype=settings.dtype)
