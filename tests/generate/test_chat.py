"""Conversations: templates, what is read of each turn, and the end of the context."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fp8lm.generate.chat import Chat, ChatFormat
from fp8lm.generate.decoding import complete
from fp8lm.runtime.errors import InputError
from tests.generate.models import greedy, loaded

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = {"User:": 90, "Assistant:": 91, "System:": 92}
ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]


class Files:
    """A tokenizer of which only the settings and the control tokens are asked for."""

    bos, eod = None, 7

    def __init__(self, settings):
        self.files = {"tokenizer_config.json": settings}

    def id_to_token(self, token):
        return f"<{token}>"


def settings(**keys):
    return Files(json.dumps({"bos_token": {"content": "<s>"}, **keys}).encode())


@pytest.mark.parametrize("template", [TEMPLATE, [{"name": "default", "template": TEMPLATE}]])
def test_the_template_of_the_tokenizer(template):
    chat_format = ChatFormat.of(settings(chat_template=template))
    assert chat_format.render(ASKED) == "<s><system>s<user>hi<assistant>"
    assert chat_format.stops == ()


def test_plain_lines_without_a_template():
    chat_format = ChatFormat.of(settings())
    assert chat_format.render(ASKED) == "System: s\nUser: hi\nAssistant:"
    assert chat_format.stops == ("\nUser:",)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [("{{ raise_exception('no system') }}", "no system"), ("{% if %}", "chat template")],
)
def test_a_template_that_refuses(template, complaint):
    with pytest.raises(InputError, match=complaint):
        ChatFormat.of(settings(chat_template=template)).render(ASKED)


def test_settings_that_are_not_json():
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        ChatFormat.of(Files(b"{"))


class Numbers:
    """Text of ids, in which the words of a rendered conversation are ids, too."""

    vocab_size, eod = 100, 99

    def __init__(self):
        self.files = {}

    def tokenize(self, text, parse_special_tokens=False):
        return [WORDS.get(word) or int(word) for word in text.split()]

    def detokenize(self, ids):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_turn_is_what_all_before_it_says(checkpoint, use_cache):
    with loaded(checkpoint("llama", "o3")) as model:
        model = replace(model, tokenizer=Numbers())
        decoding = greedy(5, use_cache=use_cache)
        chat, streamed = Chat(model, decoding, system="7"), []
        first = chat.answer("1 2", streamed.append)
        assert "".join(streamed) == first.text
        second = chat.answer("3")
        asked = [92, 7, 90, 1, 2, 91, *first.tokens, 90, 3, 91]
        assert second.prompt == asked
        assert complete(model, [asked], decoding)[0].tokens == second.tokens
        assert chat.messages[-1] == {"role": "assistant", "content": second.text.strip()}
        chat.clear()
        assert chat.answer("1 2").tokens == first.tokens
        with pytest.raises(InputError, match="/clear"):
            chat.answer("5 " * 60)
        assert len(chat.messages) == 3
