"""Chat templates: rendering as transformers does, and where the answers are."""

from __future__ import annotations

import json

import pytest

from fp8lm.convert.tokenizers import tokenizer_files
from fp8lm.data.chat import ChatTemplate, UnrenderedMessages, keep_template
from fp8lm.data.conversations import ExampleEncoder
from fp8lm.data.documents import Record
from fp8lm.data.tokenizer import load_tokenizer
from tests.data.chats import BRACKETS, PLAIN, sentencepiece, template, turns
from tests.data.tokenizers_of_all_types import write_model

TWO = turns("def x", "yield", "lambda", "return def", system="be short")
MARKED = (
    "{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{% if m.role == "
    "'assistant' %}{% generation %}{{ m | tojson }}!{% endgeneration %}{% else %}"
    "<{{ m.content | trim }}>{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer(tmp_path):
    return sentencepiece(tmp_path)


def test_answers_are_what_follows_the_prompt_up_to_the_end_of_the_turn(tokenizer):
    text, spans = template(tokenizer).render_answers(TWO)
    assert text.startswith("<s>[system] be short[user] def x[assistant] yield</s>[user] lambda")
    assert [text[begin:end] for begin, end in spans] == ["yield</s>", "return def</s>"]
    text, spans = template(tokenizer).render_answers(TWO, turns=range(3, 5))
    assert [text[begin:end] for begin, end in spans] == ["return def</s>"]


def test_or_what_the_template_marks(tokenizer):
    marked = template(tokenizer, MARKED)
    text, spans = marked.render_answers(TWO)
    assert [json.loads(text[begin : end - 1]) for begin, end in spans] == [TWO[2], TWO[4]]
    assert text == marked.render(TWO)


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer):
    last = "{% for m in messages %}{{ m.content if loop.last else 'x' }}{% endfor %}"
    with pytest.raises(UnrenderedMessages, match=r"not prefix-stable.*\{% generation %\}"):
        template(tokenizer, last).render_answers(TWO)
    once = "{% generation %}{{ messages }}{% endgeneration %}"
    with pytest.raises(UnrenderedMessages, match=r"1 parts .* 2 answers"):
        template(tokenizer, once).render_answers(TWO)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [("{{ raise_exception('no system') }}", "no system"), ("{% if %}", "chat template: ")],
)
def test_a_template_that_does_not_render(source, complaint, tokenizer):
    with pytest.raises(UnrenderedMessages, match=complaint):
        template(tokenizer, source).render(TWO)


def test_a_template_travels_with_the_tokenizer(tokenizer, tmp_path):
    assert ChatTemplate.of(tokenizer) is None
    keep_template(tokenizer, template(tokenizer))
    assert ChatTemplate.of(tokenizer).source == BRACKETS
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    again = load_tokenizer("SentencePieceTokenizer", str(tmp_path / "tokenizer.model"))
    assert ChatTemplate.of(again).source == BRACKETS


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
@pytest.mark.parametrize("source", [BRACKETS, MARKED, None])
def test_transformers_has_the_same_tokens_and_marks_the_same_answers(kind, source, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(kind, write_model(kind, tmp_path))
    chat = ChatTemplate.read(PLAIN, tokenizer) if source is None else template(tokenizer, source)
    keep_template(tokenizer, chat)
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, content in tokenizer_files(tokenizer).items():
        (folder / name).write_bytes(content)
    there = AutoTokenizer.from_pretrained(folder)
    messages = turns("def  x", "yield\n\nlambda ", "x", "return")
    record = Record("a", 1, json.dumps({"messages": messages}).encode(), True, 0)
    (found,) = ExampleEncoder(tokenizer, chat, "chat").encode(record)
    text = there.apply_chat_template(messages, tokenize=False)
    assert text == chat.render(messages)
    expected = there.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found.ids.tolist() == expected["input_ids"]
    if source != BRACKETS:  # which marks nothing
        assert found.mask.tolist() == expected["assistant_masks"]
    assert 0 < found.mask.sum() < len(found.mask)
