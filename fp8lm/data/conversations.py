"""Examples for tuning: lines of JSON to token ids, and which of them are answers.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    {"prompt": ..., "completion": ...}                    both text, or both lists of messages
    {"prompt": ..., "chosen": ..., "rejected": ...}       the same, for preferences

Messages become text by a chat template, whose control tokens are parsed; in text, and in what a
message says, there are none. An answer that is text gets the end-of-document token.

Token i is an answer's if any of its text is. Text up to the answer is tokenized a second time
alone: the tokens that both have in common are the prompt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import numpy as np

from fp8lm.data.chat import ASSISTANT, BEGIN, END, ROLES, ChatTemplate, Message, Span
from fp8lm.data.documents import BadDocument, Record, check_size, parse_fields
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.runtime.errors import InputError

ExampleFormat = Literal["chat", "preference"]
TEMPLATE_CURE = (
    "messages need a chat template: tuning.chat_template (preprocess_data.py --chat-template), "
    "such as configs/chat_templates/plain.jinja"
)


class MaskedTokens(NamedTuple):
    """Token `ids` of one sequence, and `mask` (uint8): 1 where a token is part of an answer."""

    ids: np.ndarray
    mask: np.ndarray


class BadExample(InputError):
    """What is wrong with an example; `ExampleEncoder` adds where it is."""


@dataclass(frozen=True)
class ExampleEncoder:
    """Turns JSON objects into sequences: one of a conversation, two of a preference.

    `template` renders messages; without one these are refused.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    format: ExampleFormat

    def encode(self, record: Record) -> list[MaskedTokens]:
        """The sequences of a line; `BadDocument`, with file and line, if it is no example."""
        check_size(record)
        fields = parse_fields(record)
        try:
            return self._preference(fields) if self.format == "preference" else self._chat(fields)
        except InputError as error:
            raise BadDocument(f"{record.place}: {error}") from None

    def _chat(self, fields: dict[str, Any]) -> list[MaskedTokens]:
        if "messages" in fields:
            return [self._of_messages([], fields["messages"], fields.get("tools"))]
        _require(fields, "prompt", "completion", or_else="messages")
        return [self._answer(fields, "completion", fields["prompt"])]

    def _preference(self, fields: dict[str, Any]) -> list[MaskedTokens]:
        _require(fields, "chosen", "rejected")
        chosen, rejected = fields["chosen"], fields["rejected"]
        if chosen == rejected:
            raise BadExample("chosen and rejected are the same")
        if "prompt" in fields:
            prompt = fields["prompt"]
        elif isinstance(chosen, list) and isinstance(rejected, list):
            pairs = zip(chosen, rejected, strict=False)
            prompt = [message for message, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
            fields = {
                "chosen": chosen[len(prompt) :],
                "rejected": rejected[len(prompt) :],
                "tools": fields.get("tools"),
            }
        else:
            raise BadExample("no prompt, which only lists of messages may include")
        pair = [self._answer(fields, name, prompt) for name in ("chosen", "rejected")]
        if np.array_equal(pair[0].ids, pair[1].ids):
            raise BadExample("chosen and rejected are the same tokens")
        return pair

    def _answer(self, fields: dict[str, Any], name: str, prompt: Any) -> MaskedTokens:
        answer = fields[name]
        if isinstance(prompt, str) and isinstance(answer, str):
            return self._of_text(prompt, answer)
        if isinstance(prompt, list) and isinstance(answer, list):
            return self._of_messages(prompt, answer, fields.get("tools"))
        raise BadExample(f"prompt and {name} are not both text, nor both lists of messages")

    def _of_text(self, prompt: str, answer: str) -> MaskedTokens:
        for text in (prompt, answer):
            _check_text(text)
        if not answer.strip():
            raise BadExample("the answer is empty")
        text = prompt + answer
        ids, mask = self._masked(text, [(len(prompt), len(text))], parse_special_tokens=False)
        return _as_arrays([*ids, self.tokenizer.eod], [*mask, 1])

    def _of_messages(self, prompt: list[Any], answer: Any, tools: Any) -> MaskedTokens:
        """Messages of which answers after those of `prompt` count."""
        if not isinstance(answer, list) or not answer:
            raise BadExample("no list of messages, or none after the prompt")
        messages = [*prompt, *answer]
        turns = range(len(prompt), len(messages))
        for number, message in enumerate(messages, start=1):
            self._check_message(message, f"message {number}")
        if not any(messages[turn]["role"] == ASSISTANT for turn in turns):
            raise BadExample(f"no answer: no message of role {ASSISTANT!r}")
        if self.template is None:
            raise BadExample(TEMPLATE_CURE)
        text, spans = self.template.render_answers(messages, turns, tools)
        ids, mask = self._masked(text, spans, parse_special_tokens=True)
        if not any(mask[1:]):
            raise BadExample("no token of an answer follows another token")
        return _as_arrays(ids, mask)

    def _check_message(self, message: Message, place: str) -> None:
        if not isinstance(message, dict) or "role" not in message:
            raise BadExample(f'{place} is not an object with "role" and "content"')
        if (role := message["role"]) not in ROLES:
            raise BadExample(f"{place} has the unknown role {role!r}: one of {', '.join(ROLES)}")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            return
        if not isinstance(content, str):
            raise BadExample(f"the content of {place} is not text")
        _check_text(content)
        if role == ASSISTANT and not content.strip() and not message.get("tool_calls"):
            raise BadExample(f"{place} is an empty answer")
        if not self._is_plain(content):
            raise BadExample(
                f"{place} holds the text of a control token, which could end a turn: take it out"
            )

    def _is_plain(self, content: str) -> bool:
        """Whether the text of no control token is in `content`."""
        tokenize = self.tokenizer.tokenize
        try:
            return tokenize(content) == tokenize(content, parse_special_tokens=True)
        except InputError:  # a tokenizer that can write it no other way
            return False

    def _masked(
        self, text: str, spans: Sequence[Span], *, parse_special_tokens: bool
    ) -> tuple[list[int], list[int]]:
        """Token ids of `text`, and 1 for those of which some text lies in `spans`."""
        ids = self.tokenizer.tokenize(text, parse_special_tokens)
        mask = [0] * len(ids)
        for begin, end in spans:
            first, _ = self._place(text[:begin], ids, parse_special_tokens)
            last, crosses = self._place(text[:end], ids, parse_special_tokens)
            for number in range(first, last + crosses):
                mask[number] = 1
        return ids, mask

    def _place(self, text: str, ids: list[int], parse_special_tokens: bool) -> tuple[int, bool]:
        """How many of `ids` are those of `text`, and whether it ends inside the next one.

        A tokenizer may divide the end of `text` otherwise where more follows: then the lengths of
        what the ids say tell.
        """
        own = self.tokenizer.tokenize(text, parse_special_tokens)
        count = sum(1 for _ in takewhile(lambda p: p[0] == p[1], zip(own, ids, strict=False)))
        if count in (len(own), len(ids)):
            return count, False
        said = self.tokenizer.detokenize
        length = len(said(own))
        while count < len(ids) and len(said(ids[: count + 1])) <= length:
            count += 1
        return count, count < len(ids) and len(said(ids[:count])) < length


def _require(fields: dict[str, Any], *names: str, or_else: str = "") -> None:
    if missing := [name for name in names if name not in fields]:
        present = ", ".join(repr(name[:40]) for name in list(fields)[:8]) or "none"
        besides = f"no key {or_else!r}, and " if or_else else ""
        raise BadExample(f"{besides}no key {missing[0]!r} (its keys: {present})")


def _check_text(text: str) -> None:
    if BEGIN in text or END in text:
        raise BadExample(f"a noncharacter (U+{ord(BEGIN):04X}), which text has not")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadExample("half a surrogate pair, which is not text") from None


def _as_arrays(ids: list[int], mask: list[int]) -> MaskedTokens:
    return MaskedTokens(np.array(ids, np.int64), np.array(mask, np.uint8))
