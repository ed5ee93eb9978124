"""Continuation of prompts, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from fp8lm.generate.context import CachedContext, Context, RecomputedContext
from fp8lm.generate.model import InferenceModel
from fp8lm.generate.sampling import Sampling, choose
from fp8lm.generate.text import GrowingText
from fp8lm.runtime.errors import InputError

Finish = Literal["eod", "stop", "length", "context"]


@dataclass(frozen=True)
class Decoding:
    """When generation ends, and how it computes.

    After `max_new_tokens`, at a string of `stops`, at the end of a document (unless
    `ignore_eod`), or where the model has no positions left.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 100
    stops: tuple[str, ...] = ()
    ignore_eod: bool = False
    use_cache: bool = True
    cache_dtype: str = "auto"


@dataclass
class Completion:
    """Ids of a prompt, the `tokens` that follow it, and why they end.

    `text` is their text without a stop string, `whole` with the prompt's before it.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    whole: str = ""
    finish: Finish | None = None


def complete(
    model: InferenceModel,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    *,
    first_number: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> list[Completion]:
    """Continue all `prompts` at once. A collective of the ranks that hold the model.

    `first_number` is the number of the first prompt, which its random numbers depend on. `on_text`
    gets the text of a single prompt as it grows. Raises `InputError` for a prompt that is empty or
    longer than the context.
    """
    for prompt in prompts:
        check_length(prompt, model.context_length)
    capacity = max(len(prompt) for prompt in prompts) + decoding.max_new_tokens
    kind = CachedContext if decoding.use_cache else RecomputedContext
    capacity = min(capacity, model.context_length)
    context = kind(model, len(prompts), capacity, decoding.cache_dtype)
    return continue_from(
        model, context, prompts, prompts, decoding, first_number=first_number, on_text=on_text
    )


def check_length(prompt: Sequence[int], context_length: int) -> None:
    """`InputError` for a prompt without tokens, or with more than the model has positions for."""
    if not prompt:
        raise InputError("a prompt has no tokens: give the text to continue")
    if len(prompt) > context_length:
        raise InputError(
            f"a prompt has {len(prompt)} tokens, and the model's context {context_length} "
            "(model.max_position_embeddings): shorten it"
        )


def continue_from(
    model: InferenceModel,
    context: Context,
    prompts: Sequence[list[int]],
    unread: Sequence[list[int]],
    decoding: Decoding,
    *,
    first_number: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> list[Completion]:
    """`complete` from a `context` that has read all of each prompt but `unread`."""
    sampling = decoding.sampling
    streams = [
        _Stream(model, prompt, decoding, sampling.generator(first_number + i))
        for i, prompt in enumerate(prompts)
    ]
    new = [list(tokens) for tokens in unread]
    while any(stream.done.finish is None for stream in streams):
        logits = iter(context.extend(new))
        new = [[] for _ in streams]
        for i, stream in enumerate(streams):
            if stream.done.finish is None:
                new[i] = stream.step(next(logits))
        if on_text is not None and (piece := streams[0].text.take()):
            on_text(piece)
    if on_text is not None and (piece := streams[0].text.take(final=True)):
        on_text(piece)
    return [stream.completion() for stream in streams]


class _Stream:
    """One prompt's continuation."""

    def __init__(
        self,
        model: InferenceModel,
        prompt: list[int],
        decoding: Decoding,
        generator: torch.Generator,
    ) -> None:
        self._context_length, self._eod = model.context_length, model.tokenizer.eod
        self._decoding, self._generator = decoding, generator
        self.done = Completion(list(prompt))
        self.text = GrowingText(model.tokenizer, prompt, decoding.stops)
        if decoding.max_new_tokens == 0:
            self.done.finish = "length"

    def step(self, logits: torch.Tensor) -> list[int]:
        """Choose the next token; the tokens that the model reads next, none at the end."""
        done, decoding = self.done, self._decoding
        so_far = done.prompt + done.tokens
        token = choose(logits, so_far, decoding.sampling, self._generator)
        if token == self._eod and not decoding.ignore_eod:
            done.finish = "eod"
            return []
        done.tokens.append(token)
        self.text.add(token)
        if self.text.stopped:
            done.finish = "stop"
        elif len(done.tokens) >= decoding.max_new_tokens:
            done.finish = "length"
        elif len(so_far) + 1 > self._context_length:
            done.finish = "context"
        return [] if done.finish else [token]

    def completion(self) -> Completion:
        """The result."""
        self.done.text, self.done.whole = self.text.text, self.text.whole
        return self.done
