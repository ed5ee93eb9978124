"""A conversation with a model, turn by turn.

A turn is rendered with all before it, by the chat template of the tokenizer (as `transformers` has
it) or, without one, as lines that a base model can continue:

    User: ...
    Assistant: ...

The model reads only what has changed since the turn before: its cache holds the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fp8lm.data.tokenizer import Tokenizer
from fp8lm.generate.context import CachedContext, Context, RecomputedContext
from fp8lm.generate.decoding import Completion, Decoding, continue_from
from fp8lm.generate.model import InferenceModel
from fp8lm.runtime.errors import InputError

Message = dict[str, str]
SETTINGS = "tokenizer_config.json"
PLAIN_STOP = "\nUser:"


@dataclass(frozen=True)
class ChatFormat:
    """How messages become text: by `template` (jinja2), or plainly; `stops` end a turn."""

    template: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    stops: tuple[str, ...] = (PLAIN_STOP,)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatFormat:
        """What the tokenizer's files say; `InputError` for settings that are not JSON."""
        try:
            settings = json.loads(tokenizer.files.get(SETTINGS) or b"{}")
        except ValueError:
            raise InputError(f"the tokenizer's {SETTINGS} is not JSON") from None
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template}
            template = named.get("default")
        if not isinstance(template, str):
            return cls()
        names = {name: _content(settings.get(name)) for name in ("bos_token", "eos_token")}
        return cls(template, names, ())

    def render(self, messages: list[Message]) -> str:
        """`messages` ({role, content}) and the beginning of the answer."""
        if self.template is None:
            lines = [f"{message['role'].title()}: {message['content']}" for message in messages]
            return "\n".join([*lines, "Assistant:"])
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            template = environment.from_string(self.template)
            return template.render(messages=messages, add_generation_prompt=True, **self.names)
        except TemplateError as error:
            raise InputError(f"the tokenizer's chat template: {error}") from None


def _content(token: Any) -> str:
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _refuse(message: str) -> None:
    raise TemplateError(message)


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
        self._system = [{"role": "system", "content": system}] if system else []
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
