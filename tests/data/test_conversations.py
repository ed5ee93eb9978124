"""Lines of JSON to tokens and masks, and the lines that are no examples."""

from __future__ import annotations

import json

import pytest

from fp8lm.data.conversations import ExampleEncoder
from fp8lm.data.documents import BadDocument, Record
from fp8lm.data.tokenizer import load_tokenizer
from tests.data.chats import sentencepiece, template, turns
from tests.data.tokenizers_of_all_types import write_model

ONE = turns("def", "yield")
ASKED, OTHER = ONE[:1], turns("def", "lambda")[1:]
TOOL = {"role": "assistant", "tool_calls": [{"name": "f"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return sentencepiece(tmp_path_factory.mktemp("tokenizer"))


def encode(tokenizer, fields, form="chat", with_template=True):
    line = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    own = template(tokenizer) if with_template else None
    return ExampleEncoder(tokenizer, own, form).encode(Record("x.jsonl", 7, line, True, 0))


def parts(tokenizer, found):
    """Text of what is no answer, and of answers."""
    return [
        tokenizer.detokenize([i for i, m in zip(*map(list, found), strict=True) if m == answer])
        for answer in (0, 1)
    ]


def test_prompts_and_completions(tokenizer):
    (found,) = encode(tokenizer, {"prompt": "def ", "completion": "yield"}, with_template=False)
    assert parts(tokenizer, found) == ["def ", "yield"]
    assert (found.ids[-1], found.mask[-1]) == (tokenizer.eod, 1)
    (same,) = encode(tokenizer, {"messages": ONE})
    (both,) = encode(tokenizer, {"prompt": ASKED, "completion": ONE[1:]})
    assert same.ids.tolist() == both.ids.tolist() and same.mask.tolist() == both.mask.tolist()
    (last,) = encode(tokenizer, {"prompt": [*ONE, *ASKED], "completion": OTHER})
    assert parts(tokenizer, last)[1] == "lambda"  # of the answers before, none


def test_a_token_that_begins_in_the_prompt_is_the_answers(tmp_path):
    tokenizer = load_tokenizer(
        "HuggingFaceTokenizer", write_model("HuggingFaceTokenizer", tmp_path)
    )
    whole = tokenizer.tokenize("return lambda")
    assert len(whole) == 3
    (found,) = encode(tokenizer, {"prompt": "return la", "completion": "mbda"})
    assert found.ids.tolist() == [*whole, tokenizer.eod]
    assert found.mask.tolist() == [0, 0, 1, 1]


DIVIDED = {"xab": "x ab", "xabcd": "x a bcd", "xabcde": "x ab cde"}


class Remerging:
    """Divides a text otherwise where more follows it; ids are places in `PIECES`."""

    PIECES = ("x", "a", "ab", "bcd", "e", "cde", "")
    eod = 6

    def tokenize(self, text, parse_special_tokens=True):
        return [self.PIECES.index(piece) for piece in DIVIDED[text].split()]

    def detokenize(self, ids):
        return "".join(self.PIECES[number] for number in ids)


@pytest.mark.parametrize(
    ("prompt", "completion", "mask"),
    [
        ("xab", "cd", [0, 0, 1]),  # the second token differs, the third has both texts
        ("xabcd", "e", [0, 0, 1]),  # of three tokens one begins in the prompt
        ("xab", "cde", [0, 0, 1]),  # divided alike
    ],
)
def test_a_prompt_that_is_divided_otherwise_by_itself(prompt, completion, mask):
    fields = {"prompt": prompt, "completion": completion}
    (found,) = encode(Remerging(), fields, with_template=False)
    assert found.mask.tolist() == [*mask, 1]


def test_preferences(tokenizer):
    texts = {"prompt": "def ", "chosen": "yield", "rejected": "lambda"}
    chosen, rejected = encode(tokenizer, texts, "preference")
    assert parts(tokenizer, chosen) == ["def ", "yield"]
    assert parts(tokenizer, rejected) == ["def ", "lambda"]
    messages = {"prompt": ASKED, "chosen": ONE[1:], "rejected": OTHER}
    implicit = {"chosen": ONE, "rejected": [*ASKED, *OTHER]}
    pairs = [encode(tokenizer, fields, "preference") for fields in (messages, implicit)]
    for one, two in zip(*pairs, strict=True):
        assert one.ids.tolist() == two.ids.tolist() and one.mask.tolist() == two.mask.tolist()


def test_calls_of_tools_have_no_content(tokenizer):
    source = "{{ tools }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    record = Record(
        "x", 1, json.dumps({"messages": [*ASKED, TOOL], "tools": [3]}).encode(), True, 0
    )
    (found,) = ExampleEncoder(tokenizer, template(tokenizer, source), "chat").encode(record)
    assert tokenizer.detokenize(found.ids.tolist()) == "[3]user:def;assistant:;"


def message(content, role="assistant"):
    return {"messages": [*ASKED, {"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (b"{", "invalid JSON"),
        ({"text": "a"}, "no key 'messages', and no key 'prompt' (its keys: 'text')"),
        ({"prompt": "a"}, "no key 'completion'"),
        ({"prompt": "a", "completion": ONE}, "not both text"),
        ({"prompt": "a", "completion": " \n"}, "the answer is empty"),
        ({"prompt": "a", "completion": "\ud800"}, "half a surrogate pair"),
        ({"prompt": "\ufdd0", "completion": "a"}, "noncharacter"),
        ({"messages": []}, "no list of messages"),
        ({"messages": ["a"]}, "message 1 is not an object"),
        ({"messages": ASKED}, "no answer"),
        (message("a", "robot"), "message 2 has the unknown role 'robot': one of system"),
        (message(3), "the content of message 2 is not text"),
        (message(None), "the content of message 2 is not text"),
        (message(""), "message 2 is an empty answer"),
        (message("a</s>b"), "message 2 holds the text of a control token"),
    ],
)
def test_what_is_no_example_is_named_with_its_place(fields, complaint, tokenizer):
    with pytest.raises(BadDocument) as caught:
        encode(tokenizer, fields)
    assert str(caught.value).startswith("x.jsonl, line 7: ") and complaint in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt": "a", "chosen": "b"}, "no key 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": ONE}, "prompt and rejected"),
        ({"chosen": ONE, "rejected": ASKED}, "none after the prompt"),
        # Unequal only in what the template leaves out: nothing to prefer.
        ({"chosen": ONE, "rejected": [*ONE[:-1], {**ONE[-1], "name": "x"}]}, "the same tokens"),
    ],
)
def test_what_is_no_preference(fields, complaint, tokenizer):
    with pytest.raises(BadDocument, match=complaint):
        encode(tokenizer, fields, "preference")


def test_an_answer_of_which_nothing_is_predicted(tokenizer):
    source = "{% generation %}{{ eos_token }}{% endgeneration %}"
    line = json.dumps({"messages": ONE}).encode()
    with pytest.raises(BadDocument, match="no token of an answer follows another"):
        ExampleEncoder(tokenizer, template(tokenizer, source), "chat").encode(
            Record("x.jsonl", 7, line, True, 0)
        )


def test_messages_need_a_template(tokenizer):
    with pytest.raises(BadDocument, match=r"tuning\.chat_template"):
        encode(tokenizer, {"messages": ONE}, with_template=False)
