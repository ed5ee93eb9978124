"""Chat templates: messages to text, and which parts of the text are answers.

A template is Jinja, rendered as transformers does. Answers are what the assistant says, the end of
its turn included: what `{% generation %}` encloses where the template has that, else found by
rendering the messages before and after each turn:

    render(messages[:i], add_generation_prompt)      the answer begins where this ends
    render(messages[: i + 1])                        and ends where this ends

which needs a template whose earlier text does not depend on later messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fp8lm.data.hugging_face import CONFIG
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.data.tokenizer_files import TEMPLATE
from fp8lm.runtime.errors import InputError

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
# Noncharacters, which no text has: the bounds of `{% generation %}` in rendered text.
BEGIN, END = "\ufdd0", "\ufdd1"
Message = Mapping[str, Any]
Span = tuple[int, int]


class UnrenderedMessages(InputError):
    """Messages that a template does not render, or not so that answers can be found."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with the tokens that it may name; `place` says in messages which it is."""

    source: str
    names: Mapping[str, str] = field(default_factory=dict)
    place: str = "the chat template"

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The one in the tokenizer's files, None if it has none; `InputError` if unreadable."""
        settings = _settings(tokenizer)
        source: Any = settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in source}
            source = named.get("default")
        if TEMPLATE in tokenizer.files:
            source = _decode(tokenizer.files[TEMPLATE], f"the tokenizer's {TEMPLATE}")
        if not isinstance(source, str):
            return None
        return cls.of_source(source, tokenizer, "the tokenizer's chat template")

    @classmethod
    def read(cls, path: str, tokenizer: Tokenizer) -> ChatTemplate:
        """The one in a file, for `tokenizer`; `InputError` if it cannot be read."""
        place = f"chat template {path}"
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{place} cannot be read: {error.strerror or error}") from None
        return cls.of_source(_decode(content, place), tokenizer, place)

    @classmethod
    def of_source(cls, source: str, tokenizer: Tokenizer, place: str) -> ChatTemplate:
        """One for `tokenizer`, whose control tokens it may name."""
        return cls(source, control_tokens(tokenizer), place)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """`messages` ({role, content}) as text; with the beginning of the answer on request.

        `tools` are those that the template may describe. `UnrenderedMessages` where it refuses.
        """
        return _unmarked(self._rendered(messages, tools, add_generation_prompt))

    def render_answers(
        self,
        messages: Sequence[Message],
        turns: Collection[int] | None = None,
        tools: Sequence[Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """Text of `messages`, and where in it the answers among `turns` are (default: all).

        `turns` are numbers of messages. `UnrenderedMessages` where answers cannot be found.
        """
        wanted = [
            number
            for number, message in enumerate(messages)
            if message["role"] == ASSISTANT and (turns is None or number in turns)
        ]
        marked = self._rendered(messages, tools, add_generation_prompt=False)
        if BEGIN not in marked:
            return marked, [self._span(messages, tools, number, marked) for number in wanted]
        spans = _marked_spans(marked)
        answers = [number for number, m in enumerate(messages) if m["role"] == ASSISTANT]
        if len(spans) != len(answers):
            raise UnrenderedMessages(
                f"{self.place} encloses {len(spans)} parts in {{% generation %}}, and there are "
                f"{len(answers)} answers: enclose each once"
            )
        of_turn = dict(zip(answers, spans, strict=True))
        return _unmarked(marked), [of_turn[number] for number in wanted]

    def _span(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, number: int, text: str
    ) -> Span:
        before = self.render(messages[:number], tools, add_generation_prompt=True)
        after = self.render(messages[: number + 1], tools)
        if not (text.startswith(after) and after.startswith(before)):
            raise UnrenderedMessages(
                f"{self.place} is not prefix-stable: message {number + 1} changes what is rendered "
                "of earlier ones, so that answers cannot be told apart: enclose them in "
                "{% generation %} ... {% endgeneration %}"
            )
        return len(before), len(after)

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
    ) -> str:
        try:
            return _compiled(self.source).render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self.names,
            )
        except Exception as error:  # an expression of the template may raise anything
            raise UnrenderedMessages(f"{self.place}: {error}") from None


def keep_template(tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
    """Put `template` among the tokenizer's files, from where checkpoints and exports take it."""
    own = ChatTemplate.of(tokenizer)
    if template is not None and (own is None or own.source != template.source):
        tokenizer.files[TEMPLATE] = template.source.encode()


def control_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Text of the control tokens that templates name: `bos_token`, `eos_token`."""
    settings = _settings(tokenizer)
    names = {}
    for name, number in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eod)):
        content = _content(settings.get(name))
        if not content and number is not None:
            content = tokenizer.id_to_token(number)
        names[name] = content
    return names


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    try:
        return json.loads(tokenizer.files.get(CONFIG) or b"{}")
    except ValueError:
        raise InputError(f"the tokenizer's {CONFIG} is not JSON") from None


def _content(token: Any) -> str:
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InputError(f"{place} is not UTF-8 text") from None


def _marked_spans(marked: str) -> list[Span]:
    """Where in the text without marks its enclosed parts are."""
    spans, marks = [], 0
    for match in re.finditer(f"{BEGIN}([^{BEGIN}{END}]*){END}", marked):
        begin = match.start() - marks
        spans.append((begin, begin + len(match[1])))
        marks += 2
    return spans


def _unmarked(marked: str) -> str:
    return marked.replace(BEGIN, "").replace(END, "")


class _Generation(Extension):
    """`{% generation %}`: puts marks around what the block renders."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """See `Extension`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{BEGIN}{caller()}{END}"


@lru_cache(maxsize=4)
def _compiled(source: str) -> Template:
    """As in transformers: sandboxed, with loop controls and its few functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
    return environment.from_string(source)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
