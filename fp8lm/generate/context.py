"""What sequences have read so far: with a cache of keys and values, or read again every time.

Both quantize keys and values alike and attend over the same number of slots, so that they compute
the same numbers: without a cache is slower, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fp8lm.generate.model import InferenceModel


class Context(Protocol):
    """Some sequences of up to `capacity` tokens each."""

    @property
    def lengths(self) -> list[int]:
        """Tokens that each has read."""

    def extend(self, new_tokens: Sequence[list[int]]) -> Tensor:
        """Read `new_tokens` of every sequence; logits [n,V] after each of those that have some."""

    def cut(self, sequence: int, length: int) -> None:
        """Forget what `sequence` has read after its first `length` tokens."""


class CachedContext:
    """`Context` whose keys and values are kept, in a format of `KV_CACHE_DTYPES`."""

    def __init__(
        self, model: InferenceModel, sequences: int, capacity: int, cache_dtype: str = "auto"
    ) -> None:
        self._model = model
        self._lengths = [0] * sequences
        self.cache = model.new_cache(sequences, capacity, cache_dtype)

    @property
    def lengths(self) -> list[int]:
        """See `Context`."""
        return self._lengths

    def extend(self, new_tokens: Sequence[list[int]]) -> Tensor:
        """See `Context`."""
        logits = self._model.next_logits(self.cache, self._lengths, new_tokens)
        self._lengths = [a + len(b) for a, b in zip(self._lengths, new_tokens, strict=True)]
        return logits

    def cut(self, sequence: int, length: int) -> None:
        """See `Context`."""
        self._lengths[sequence] = min(self._lengths[sequence], length)


class RecomputedContext:
    """`Context` that reads all tokens again for every new one."""

    def __init__(
        self, model: InferenceModel, sequences: int, capacity: int, cache_dtype: str = "auto"
    ) -> None:
        self._model, self._capacity, self._cache_dtype = model, capacity, cache_dtype
        self._texts: list[list[int]] = [[] for _ in range(sequences)]

    @property
    def lengths(self) -> list[int]:
        """See `Context`."""
        return [len(text) for text in self._texts]

    def extend(self, new_tokens: Sequence[list[int]]) -> Tensor:
        """See `Context`."""
        self._texts = [a + b for a, b in zip(self._texts, new_tokens, strict=True)]
        cache = self._model.new_cache(len(self._texts), self._capacity, self._cache_dtype)
        read = [text if new else [] for text, new in zip(self._texts, new_tokens, strict=True)]
        return self._model.next_logits(cache, [0] * len(read), read)

    def cut(self, sequence: int, length: int) -> None:
        """See `Context`."""
        del self._texts[sequence][length:]
