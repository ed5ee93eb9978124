"""Perplexity of a corpus, per token, byte and word.

Every document is read by itself, its first token after the token that ends documents, in windows:

    window 8, stride 8    |12345678|9...      no token is read twice; a window's first tokens have
                                              little context
    window 8, stride 2    |12345678|          the first window, then each new pair of tokens
                            |345678[9 10]|    after the 8 before it

All tokens of the text are scored, once. A token's loss depends on the tokens before it alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fp8lm.data.documents import check_inputs, parse_record, read_records
from fp8lm.data.indexed import inspect_indexed
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.evaluation.scoring import Passage, score_all, windows
from fp8lm.evaluation.statistics import Mean, per_token
from fp8lm.generate.model import InferenceModel
from fp8lm.runtime.errors import InputError


@dataclass(frozen=True)
class Corpus:
    """Documents as ids, and the sizes of their texts in bytes (UTF-8) and words."""

    documents: list[list[int]]
    num_bytes: int
    num_words: int

    @classmethod
    def of(cls, documents: list[list[int]], texts: Sequence[str]) -> Corpus:
        """From ids and text of every document."""
        num_bytes = sum(len(text.encode()) for text in texts)
        return cls(documents, num_bytes, sum(len(re.split(r"\s+", text)) for text in texts))


def read_corpus(
    data: str,
    tokenizer: Tokenizer,
    most_tokens: int | None = None,
    *,
    input_format: str = "auto",
    key: str = "text",
) -> Corpus:
    """`data` is the prefix of a `.bin` and `.idx` file, or a text or JSON lines file.

    `input_format` is one of `INPUT_FORMATS`; of JSON, `key` has the text. Whole documents up to
    `most_tokens`, at least one. `InputError` for what cannot be read, ids that the tokenizer lacks,
    and a corpus without tokens.
    """
    indexed = Path(f"{data}.idx").exists() or not Path(data).exists()
    texts_of = partial(_texts, input_format=input_format, key=key)
    read = _indexed(data, tokenizer) if indexed else texts_of(data, tokenizer)
    documents: list[list[int]] = []
    texts: list[str] = []
    total = 0
    for ids, text in read:
        if not ids or (documents and most_tokens is not None and total + len(ids) > most_tokens):
            continue
        documents.append(ids)
        texts.append(text)
        total += len(ids)
        if most_tokens is not None and total >= most_tokens:
            break
    if not documents:
        raise InputError(f"--data {data} has no tokens: give a corpus with text")
    return Corpus.of(documents, texts)


def _indexed(prefix: str, tokenizer: Tokenizer) -> Iterator[tuple[list[int], str]]:
    """Documents of an indexed file, without the token that ends them."""
    data = inspect_indexed(prefix)
    for first, last in zip(data.marks[:-1], data.marks[1:], strict=True):
        start = int(data.ends[first - 1]) if first else 0
        count = int(data.lengths[first:last].sum())
        ids = data.read(start, count).tolist() if count else []
        if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
            raise InputError(
                f"--data {prefix} has token {max(ids)}, and the tokenizer {tokenizer.vocab_size} "
                "tokens: preprocess it with the tokenizer of the checkpoint"
            )
        if ids and ids[-1] == tokenizer.eod:
            ids.pop()
        yield ids, tokenizer.detokenize(ids)


def _texts(
    file: str, tokenizer: Tokenizer, *, input_format: str, key: str
) -> Iterator[tuple[list[int], str]]:
    for record in read_records(check_inputs([file]), input_format=input_format):
        text = parse_record(record, [key])[key]
        yield tokenizer.tokenize(text), text


@dataclass(frozen=True)
class Perplexity:
    """`nats` and `tokens` of every window, in the order of the corpus."""

    documents: int
    num_bytes: int
    num_words: int
    window: int
    stride: int
    nats: list[float] = field(repr=False)
    tokens: list[int] = field(repr=False)

    @property
    def loss(self) -> Mean:
        """Nats per token; its error is over windows."""
        return per_token(self.nats, self.tokens)

    def difference(self, other: Perplexity) -> Mean | None:
        """Loss of this minus that of `other` on the same windows; None if they are others."""
        if self.tokens != other.tokens:
            return None
        pairs = zip(self.nats, other.nats, strict=True)
        return per_token([a - b for a, b in pairs], self.tokens)

    def facts(self) -> dict[str, Any]:
        """Everything but the windows, for JSON; errors are standard errors."""
        loss, total = self.loss, sum(self.tokens)
        per_byte, per_word = total / self.num_bytes, total / self.num_words
        perplexity, of_word = math.exp(loss.value), _exp(loss.value * per_word)
        return {
            "documents": self.documents,
            "windows": len(self.tokens),
            "window": self.window,
            "stride": self.stride,
            "tokens": total,
            "bytes": self.num_bytes,
            "words": self.num_words,
            "loss": loss.value,
            "loss_stderr": loss.error,
            "perplexity": perplexity,
            "perplexity_stderr": perplexity * loss.error,
            "bits_per_byte": loss.value * per_byte / math.log(2),
            "bits_per_byte_stderr": loss.error * per_byte / math.log(2),
            "byte_perplexity": math.exp(loss.value * per_byte),
            "word_perplexity": of_word,
            "word_perplexity_stderr": of_word * loss.error * per_word,
        }


def _exp(value: float) -> float:
    return math.exp(value) if value < math.log(float("1e308")) else math.inf


def perplexity(
    model: InferenceModel, corpus: Corpus, window: int, stride: int, batch_size: int
) -> Perplexity:
    """Of `model` on `corpus`; a collective of all ranks.

    Raises `InputError` for a window beyond the model's context, and a stride beyond the window.
    """
    check_windows(window, stride, model.context_length)
    eod = model.tokenizer.eod
    passages: list[Passage] = []
    for document in corpus.documents:
        passages += windows(document, eod, window, stride)
    scores = score_all(model, passages, batch_size, "perplexity")
    return Perplexity(
        len(corpus.documents),
        corpus.num_bytes,
        corpus.num_words,
        window,
        stride,
        [score.nats for score in scores],
        [passage.scored for passage in passages],
    )


def check_windows(window: int, stride: int, context_length: int) -> None:
    """`InputError` unless stride <= window <= context."""
    if window > context_length:
        raise InputError(
            f"--window {window} is beyond the model's context of {context_length} tokens "
            "(model.max_position_embeddings): use a smaller one"
        )
    if stride > window:
        raise InputError(
            f"--stride {stride} is larger than --window {window}: tokens between would have no "
            "score; use at most the window"
        )
