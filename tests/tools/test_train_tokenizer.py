from __future__ import annotations

import gzip
import json

import pytest

from fp8lm.data.tokenizer import load_tokenizer

LINES = [f"def function_{i}(value):\n    return value + {i}\n" for i in range(200)]
TEXT = "  def  f(x):\n\treturn  x  # größe 漢字 🙂 \x00\r\n\n"


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_any_text_comes_back_exactly(run_tool, corpus, tmp_path, model_type):
    def train(name):
        arguments = ("--vocab-size", 300, "--model-type", model_type)
        prefix = tmp_path / "made" / name
        assert not run_tool(
            "train_tokenizer", "--input", corpus, *arguments, "--output-prefix", prefix
        )
        return prefix.with_suffix(".model")

    first, second = train("first"), train("second")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(first.parent.iterdir()) == [first, second]
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(first))
    assert (tokenizer.vocab_size, tokenizer.eod) == (300, 2)
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
    assert tokenizer.eod not in tokenizer.tokenize("</s>" + TEXT)
    # It learnt something: fewer tokens than bytes.
    assert len(tokenizer.tokenize(LINES[7])) < 0.8 * len(LINES[7])


def test_long_lines_and_several_files_are_learnt_from(run_tool, tmp_path, corpus):
    long = tmp_path / "long.txt"
    long.write_text("parallelogram " * 2000 + "漢" * 5000)
    prefix = tmp_path / "tok"
    arguments = ("--input", corpus, long, "--vocab-size", 330, "--output-prefix", prefix)
    assert run_tool("train_tokenizer", *arguments) == 0
    tokenizer = load_tokenizer("SentencePieceTokenizer", f"{prefix}.model")
    assert len(tokenizer.tokenize("parallelogram")) <= 3
    assert len(tokenizer.tokenize("漢")) == 1
    assert len(tokenizer.tokenize("function_")) <= 3


@pytest.mark.parametrize("line", ["x" * 2500, "ab " * 900, "", "short", " " * 1500 + "end"])
def test_cut_lines_lose_nothing(tool, line):
    pieces = list(tool("train_tokenizer").cut(line))
    assert "".join(pieces) == line
    assert all(0 < len(piece) <= 1000 for piece in pieces)


def test_max_mb_says_that_it_stops(run_tool, corpus, tmp_path, capsys):
    arguments = ("--input", corpus, "--vocab-size", 290, "--output-prefix", tmp_path / "tok")
    assert run_tool("train_tokenizer", *arguments, "--max-mb", 0.001) == 0
    assert "reading stops at --max-mb 0.001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, {}, "corpus.jsonl does not exist"),
        ("", {}, "the corpus is empty"),
        ('{"text": ""}\n', {}, "the corpus is empty"),
        ('{"text": "a"}\n{', {}, "corpus.jsonl, line 2: invalid JSON"),
        ('{"body": "a"}\n', {}, "corpus.jsonl, line 1: no key 'text' (its keys: 'body')"),
        ('{"text": "a b c"}\n', {"--vocab-size": 5000}, "--vocab-size 5000 is too large"),
        ('{"text": "a b c"}\n', {"--vocab-size": 100}, "--vocab-size 100 is too small"),
        ('{"text": "a b c"}\n', {"--vocab-size": 261}, "--vocab-size 261 is too small"),
    ],
)
def test_bad_input_is_one_line_and_no_file(run_tool, tmp_path, capfd, content, arguments, message):
    corpus = tmp_path / "corpus.jsonl"
    if content is not None:
        corpus.write_text(content)
    options = {"--input": corpus, "--vocab-size": 300, "--output-prefix": tmp_path / "tok"}
    flat = [part for option in (options | arguments).items() for part in option]
    assert run_tool("train_tokenizer", *flat) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert [path for path in tmp_path.iterdir() if path != corpus] == []


def test_any_name_compressed_and_bad_lines(run_tool, corpus, tmp_path, capfd):
    content = corpus.read_bytes() + b"{\n"
    (tmp_path / "corpus.ndjson.gz").write_bytes(gzip.compress(content))
    arguments = ("--input", tmp_path / "corpus.ndjson.gz", "--vocab-size", 290)
    arguments = (*arguments, "--output-prefix", tmp_path / "tok")
    assert run_tool("train_tokenizer", *arguments) == 2
    assert "corpus.ndjson.gz, line 201: invalid JSON" in capfd.readouterr().err
    assert run_tool("train_tokenizer", *arguments, "--on-bad-line", "skip") == 0
    assert "1 bad document" in capfd.readouterr().err
