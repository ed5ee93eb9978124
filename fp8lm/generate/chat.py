"""A conversation with a model, turn by turn.

A turn is rendered with all before it, by the chat template of the tokenizer (as `transformers` has
it) or, without one, as lines that a base model can continue:

    User: ...
    Assistant: ...

The model reads only what has changed since the turn before: its cache holds the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile

from fp8lm.data.chat import ChatTemplate, Message
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.generate.context import CachedContext, Context, RecomputedContext
from fp8lm.generate.decoding import Completion, Decoding, continue_from
from fp8lm.generate.model import InferenceModel
from fp8lm.runtime.errors import InputError

PLAIN_STOP = "\nUser:"


@dataclass(frozen=True)
class ChatFormat:
    """How messages become text: by `template`, or plainly; `stops` end a turn."""

    template: ChatTemplate | None = None
    stops: tuple[str, ...] = (PLAIN_STOP,)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatFormat:
        """What the tokenizer's files say; `InputError` if they cannot be read."""
        template = ChatTemplate.of(tokenizer)
        return cls() if template is None else cls(template, ())

    def render(self, messages: list[Message]) -> str:
        """`messages` ({role, content}) and the beginning of the answer."""
        if self.template is None:
            lines = [f"{message['role'].title()}: {message['content']}" for message in messages]
            return "\n".join([*lines, "Assistant:"])
        return self.template.render(messages, add_generation_prompt=True)


class Chat:
    """A conversation; `system` is what the model is told before it."""

    def __init__(
        self, model: InferenceModel, decoding: Decoding, system: str | None = None
    ) -> None:
        self._model = model
        self._format = ChatFormat.of(model.tokenizer)
        self._decoding = replace(decoding, stops=(*decoding.stops, *self._format.stops))
        kind = CachedContext if decoding.use_cache else RecomputedContext
        self._context: Context = kind(model, 1, model.context_length, decoding.cache_dtype)
        self._read: list[int] = []
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns = 0
        self.messages = list(self._system)

    def clear(self) -> None:
        """Begin anew."""
        self.messages = list(self._system)

    def answer(self, text: str, on_text: Callable[[str], None] | None = None) -> Completion:
        """The model's answer to `text`, which `on_text` gets as it grows.

        Raises `InputError` for a conversation longer than the context, which stays as it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        rendered = self._format.render(asked)
        parse = self._format.template is not None
        tokens = self._model.tokenizer.tokenize(rendered, parse_special_tokens=parse)
        if len(tokens) >= self._model.context_length:
            raise InputError(
                f"the conversation has {len(tokens)} tokens, and the model's context "
                f"{self._model.context_length}: /clear begins anew"
            )
        both = zip(tokens[:-1], self._read, strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        self._context.cut(0, known)
        (done,) = continue_from(
            self._model,
            self._context,
            [tokens],
            [tokens[known:]],
            self._decoding,
            first_number=self._turns,
            on_text=on_text,
        )
        self._read = [*tokens, *done.tokens][: self._context.lengths[0]]
        self._turns += 1
        answer = done.text.strip() if self._format.template is None else done.text
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return done
