"""Texts, tokenizers and token files."""

from __future__ import annotations

import json
import struct

import numpy as np

from fp8lm.data.indexed_writer import IndexedWriter
from fp8lm.data.tokenizer import NullTokenizer
from tests.bad_input.cases import run, train, writes

DATA = "data.data_path=[P]"


def tokens(change=lambda folder: None, vocab_size=255):
    """Token files P.{bin,idx,json} of a NullTokenizer, and what is wrong with them."""

    def prepare(folder):
        with IndexedWriter(str(folder / "P"), np.uint16) as writer:
            for _ in range(40):
                writer.add(np.arange(200, dtype=np.uint16))
            writer.publish({"tokenizer": NullTokenizer(vocab_size).identity, "append_eod": False})
        change(folder)

    return prepare


def cut(name, count):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:count])

    return change


def overwrite(name, offset, content):
    def change(folder):
        old = (folder / name).read_bytes()
        (folder / name).write_bytes(old[:offset] + content + old[offset + len(content) :])

    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


def renamed(folder):
    for kind in ("bin", "idx", "json"):
        (folder / f"P.{kind}").rename(folder / f"P_text_document.{kind}")


TOKENS = [
    train(DATA, says="data.data_path: P.idx does not exist"),
    train(DATA, says="did you mean P_text_document?", prepare=tokens(renamed)),
    train(
        DATA,
        "data.reset_attention_mask=true",
        says=("P has no end-of-document tokens (id 255)", "--append-eod"),
        prepare=tokens(),
    ),
    train("data.data_path=[P.bin]", says="P.bin.idx does not exist", prepare=tokens()),
    train(DATA, says="P.bin does not exist", prepare=tokens(remove("P.bin"))),
    train(DATA, says=("P.idx", "index"), prepare=tokens(cut("P.idx", 5))),
    train(DATA, says="P.idx is truncated: it has 20 bytes", prepare=tokens(cut("P.idx", 20))),
    train(DATA, says="P.idx is truncated: it has 50 bytes", prepare=tokens(cut("P.idx", 50))),
    train(
        DATA,
        says="P.idx has version 2 of the format: only 1 is known",
        prepare=tokens(overwrite("P.idx", 9, struct.pack("<Q", 2))),
    ),
    train(
        DATA,
        says="P.idx is corrupt: token type 99 is unknown",
        prepare=tokens(overwrite("P.idx", 17, b"\x63")),
    ),
    train(
        DATA,
        says=("float64", "integers"),
        prepare=tokens(overwrite("P.idx", 17, b"\x06")),
    ),
    train(
        DATA,
        says="P.idx is corrupt: lengths and offsets disagree",
        prepare=tokens(overwrite("P.idx", 34, struct.pack("<i", 7))),
    ),
    train(DATA, says="P.bin is truncated: it has 100 bytes", prepare=tokens(cut("P.bin", 100))),
    train(
        DATA,
        says="P was tokenized with NullTokenizer",
        prepare=tokens(vocab_size=300),
    ),
    train(
        DATA,
        says=("P.json", "tokenizer", "preprocess again"),
        prepare=tokens(lambda folder: (folder / "P.json").write_text("{}")),
    ),
    train(
        DATA,
        says="P.json",
        prepare=tokens(lambda folder: (folder / "P.json").write_text('{"tokenizer": {}}')),
    ),
    train(
        DATA,
        "tokenizer.vocab_size=63",
        says=("P.bin holds token id 64 in document 0", "the tokenizer's vocabulary of 64"),
        prepare=tokens(remove("P.json")),
    ),
    train(DATA, "data.split='99.99,0.01,0'", says="no documents of P", prepare=tokens()),
    train(
        DATA,
        "data.data_cache_path=P.bin/cache",
        "data.split='1,0,0'",
        says="data.data_cache_path",
        prepare=tokens(),
    ),
]


def tokenizer(kind, path, **more):
    return train(
        f"tokenizer.tokenizer_type={kind}Tokenizer", f"tokenizer.tokenizer_model={path}", **more
    )


VOCAB = json.dumps({"a": 0, "b": 1})
FAST = json.dumps(
    {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
)
TOKENIZERS = [
    tokenizer("SentencePiece", "gpt2", says=("gpt2 does not exist", "local")),
    tokenizer("HuggingFace", "t.model", says="SentencePiece", prepare=writes(t__model=b"\n\x0e")),
    tokenizer("SentencePiece", "t.json", says="HuggingFace", prepare=writes(t__json="{}")),
    tokenizer("SentencePiece", "t", says="is not a SentencePiece model", prepare=writes(t="x")),
    tokenizer("HuggingFace", ".", says="tokenizer_model . holds no tokenizer.json"),
    tokenizer(
        "HuggingFace", "tokenizer.json", says="cannot be read", prepare=writes(tokenizer__json="{")
    ),
    tokenizer(
        "HuggingFace",
        "tokenizer.json",
        says="has no end-of-document token",
        prepare=writes(tokenizer__json=FAST),
    ),
    tokenizer(
        "HuggingFace",
        ".",
        says="tokenizer_config.json of tokenizer . is not a JSON object",
        prepare=writes(tokenizer__json=FAST, tokenizer_config__json="[]"),
    ),
    tokenizer("GPT2BPE", ".", says="holds no vocab.json"),
    tokenizer("GPT2BPE", ".", says="holds no merges.txt", prepare=writes(vocab__json=VOCAB)),
    tokenizer(
        "GPT2BPE", ".", says="cannot be read", prepare=writes(vocab__json="{", merges__txt="")
    ),
    tokenizer(
        "GPT2BPE",
        ".",
        says="has no <|endoftext|>",
        prepare=writes(vocab__json=VOCAB, merges__txt="#version: 0.2\n"),
    ),
    tokenizer(
        "Tik", "t.json", says="needs tiktoken: pip install tiktoken", prepare=writes(t__json="[]")
    ),
]


def preprocess(*arguments, says, prepare=lambda folder: None, kind="NullTokenizer"):
    options = ("--output-prefix", "out", "--tokenizer-type", kind, "--vocab-size", "99")
    return run("preprocess_data", *options, *arguments, says=says, prepare=prepare)


TEXTS = [
    preprocess("--input", "no.jsonl", says="input no.jsonl does not exist"),
    preprocess("--input", ".", says="input . is a folder"),
    preprocess(
        "--input",
        "a.jsonl",
        says="a.jsonl, line 2: invalid JSON",
        prepare=writes(a__jsonl='{"text": "1"}\n{'),
    ),
    preprocess(
        "--input",
        "a.jsonl",
        says="line 1: expected one JSON object a line",
        prepare=writes(a__jsonl="[1]"),
    ),
    preprocess(
        "--input",
        "a.jsonl",
        says="line 1: no key 'text' (its keys: 'body')",
        prepare=writes(a__jsonl='{"body": "1"}'),
    ),
    preprocess(
        "--input",
        "a.jsonl",
        says="the value of 'text' is not a string",
        prepare=writes(a__jsonl='{"text": 1}'),
    ),
    preprocess(
        "--input",
        "a.jsonl",
        says="half a surrogate pair",
        prepare=writes(a__jsonl='{"text": "\\ud800"}'),
    ),
    preprocess(
        "--input", "a.txt", says="a.txt, line 2: not UTF-8 text", prepare=writes(a__txt=b"1\n\xff")
    ),
    preprocess(
        "--input",
        "a.txt",
        says="reads whitespace-separated integers",
        prepare=writes(a__txt="one two"),
    ),
    preprocess(
        "--input", "a.txt", says="id 100 is outside 0 .. 99", prepare=writes(a__txt="1 100")
    ),
    run(
        "train_tokenizer",
        *("--input", "a.txt", "--vocab-size", "9999", "--output-prefix", "t"),
        says=("--vocab-size 9999", "at most"),
        prepare=writes(a__txt="a few words"),
    ),
    run(
        "train_tokenizer",
        *("--input", "a.txt", "--vocab-size", "99", "--output-prefix", "t"),
        says="--vocab-size 99 is too small: 259 pieces are fixed",
        prepare=writes(a__txt="a few words"),
    ),
    run(
        "train_tokenizer",
        *("--input", "a.txt", "--vocab-size", "300", "--output-prefix", "t"),
        says=("empty", "a.txt"),
        prepare=writes(a__txt=""),
    ),
]

CHAT = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}

TURNS = "{% for m in messages %}{{ m.content }} {% endfor %}"


def examples(*overrides, lines, says, template=TURNS):
    """Tuning on a file of JSON lines."""
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    files = ["data.data_path=[x.jsonl]", "data.split='1,0,0'", "tuning.chat_template=t.jinja"]
    prepare = writes(x__jsonl=text, t__jinja=template)
    return train("train.objective=sft", *files, *overrides, says=says, prepare=prepare)


MARKED = "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
EXAMPLES = [
    train("train.objective=sft", "data.data_path=[P]", says="data.data_path: P.idx does not exist"),
    train("train.objective=sft", "data.data_path=[x.jsonl]", says="x.jsonl does not exist"),
    train("train.objective=sft", "data.data_path=[1,a]", says="drop the weights"),
    train("train.objective=sft", DATA, says="P holds text documents", prepare=tokens()),
    train(
        *("train.objective=sft", "data.data_path=[x.jsonl]", "tuning.chat_template=no"),
        says="chat template no cannot be read",
        prepare=writes(x__jsonl=json.dumps(CHAT)),
    ),
    examples(lines=[CHAT, "{"], says="x.jsonl, line 2: invalid JSON"),
    examples(lines=[{"text": "1"}], says="x.jsonl, line 1: no key 'messages'"),
    examples(lines=[CHAT], template="{% if %}", says="x.jsonl, line 1: chat template t.jinja: "),
    examples(lines=[CHAT], template="{{ messages | length }}", says="is not prefix-stable"),
    examples(lines=[{"messages": CHAT["messages"][:1]}], says="line 1: no answer: no message of"),
    examples(
        "model.seq_length=16",
        lines=[{"prompt": "1 " * 16, "completion": "2"}],
        says=("x.jsonl, line 1: 17 tokens", "tuning.on_long_example=skip"),
    ),
    examples("tuning.on_bad_line=skip", lines=["{"], says="no examples: 1 bad document"),
    examples(lines=[CHAT], template=MARKED, says="line 1: no token of an answer follows another"),
    examples("data.split='1,1,0'", lines=[CHAT], template="0 " + MARKED, says="no examples for tr"),
]

PAIR = {"prompt": "1", "chosen": "2", "rejected": "3"}
PREFERENCES = [
    examples("train.objective=dpo", lines=[CHAT], says="x.jsonl, line 1: no key 'chosen'"),
    examples(
        "train.objective=dpo", lines=[PAIR | {"chosen": "3"}], says="chosen and rejected are the"
    ),
    examples(
        *("train.objective=dpo", "model.seq_length=16"),
        lines=[PAIR | {"chosen": "2 " * 16}],
        says="17 tokens of chosen and rejected together, and a sample has 16",
    ),
    examples(
        *("train.objective=dpo", "checkpoint.pretrained=none"),
        lines=[PAIR],
        says="no checkpoint in checkpoint.pretrained = none",
    ),
]

CASES = [*TOKENS, *TOKENIZERS, *TEXTS, *EXAMPLES, *PREFERENCES]
