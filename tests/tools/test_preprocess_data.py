from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from fp8lm.data.indexed import inspect_indexed
from fp8lm.data.token_checks import check_tokenizer
from fp8lm.data.tokenizer import load_tokenizer
from fp8lm.runtime.errors import EXIT_FAILED, EXIT_INTERRUPTED

TEXTS = [f"def f{i}():\n    return 'größe {i}'\n" * (i % 7 + 1) for i in range(60)]
TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


def write_jsonl(path, *objects):
    path.write_text("".join(json.dumps(fields) + "\n" for fields in objects))
    return path


@pytest.fixture(scope="session")
def model(tool, tmp_path_factory):
    """A SentencePiece model."""
    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    pieces = [line for text in TEXTS for line in text.splitlines()]
    path.write_bytes(tool("train_tokenizer").train(pieces, 300, "bpe"))
    return path


@pytest.fixture
def preprocess(run_tool, tmp_path, model):
    """Run the tool; outputs go to `out/P_*`."""

    def run(*inputs, prefix="P", arguments=()):
        return run_tool(
            "preprocess_data",
            *("--input", *inputs, "--output-prefix", tmp_path / "out" / prefix),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model),
            *arguments,
        )

    return run


def read(prefix):
    dataset = IndexedDataset(str(prefix))  # its arrays die with it
    return [document.tolist() for document in dataset[:]]


def outputs(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").glob("**/*"))


@pytest.mark.parametrize("append_eod", [False, True])
def test_documents_round_trip_in_order(preprocess, tmp_path, model, append_eod):
    half = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    first = write_jsonl(tmp_path / "a.jsonl", *half[:20], {"text": ""})
    second = write_jsonl(tmp_path / "b.jsonl", *half[20:])
    second.write_text(second.read_text() + "\n\n")  # blank lines are no documents
    assert preprocess(first, second, arguments=["--append-eod"] if append_eod else []) == 0
    documents = read(tmp_path / "out" / "P_text_document")
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(model))
    end = [tokenizer.eod] if append_eod else []
    assert documents == [tokenizer.tokenize(text) + end for text in TEXTS]
    assert [tokenizer.detokenize(document) for document in documents] == TEXTS
    assert outputs(tmp_path) == [f"P_text_document.{suffix}" for suffix in ("bin", "idx", "json")]
    data = inspect_indexed(str(tmp_path / "out" / "P_text_document"))
    assert data.dtype == np.uint16
    check_tokenizer(data, tokenizer)


def test_workers_do_not_change_a_byte(preprocess, tmp_path):
    texts = [{"text": text * 300} for text in TEXTS]  # several batches
    corpus = write_jsonl(tmp_path / "corpus.jsonl", *texts)
    for workers in (1, 2):
        assert preprocess(corpus, prefix=str(workers), arguments=["--workers", workers]) == 0
    for suffix in ("bin", "idx", "json"):
        one, two = (tmp_path / "out" / f"{n}_text_document.{suffix}" for n in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_every_key_has_its_files(preprocess, tmp_path, model):
    corpus = write_jsonl(
        tmp_path / "c.jsonl", {"title": "a", "body": "b"}, {"title": "", "body": "c"}
    )
    assert preprocess(corpus, arguments=["--json-keys", "title", "body"]) == 0
    tokenize = load_tokenizer("SentencePieceTokenizer", str(model)).tokenize
    assert read(tmp_path / "out" / "P_title_document") == [tokenize("a")]
    assert read(tmp_path / "out" / "P_body_document") == [tokenize("b"), tokenize("c")]


@pytest.mark.parametrize(
    ("arguments", "documents"),
    [([], ["one\ntwo\r\n\nthree"]), (["--split-lines"], ["one", "two", "three"])],
)
def test_plain_text_is_one_document_or_its_lines(preprocess, tmp_path, model, arguments, documents):
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(b"\xef\xbb\xbfone\ntwo\r\n\nthree")
    assert preprocess(corpus, arguments=arguments) == 0
    tokenize = load_tokenizer("SentencePieceTokenizer", str(model)).tokenize
    assert read(tmp_path / "out" / "P_text_document") == list(map(tokenize, documents))


def test_large_vocabularies_are_stored_wide(run_tool, tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", {"text": "1 2 70000"})
    arguments = ("--tokenizer-type", "NullTokenizer", "--vocab-size", 70000, "--append-eod")
    prefix = tmp_path / "P"
    assert not run_tool("preprocess_data", "--input", corpus, "--output-prefix", prefix, *arguments)
    assert read(f"{prefix}_text_document") == [[1, 2, 70000, 70000]]
    assert inspect_indexed(f"{prefix}_text_document").dtype == np.int32


BAD = {
    "missing file": (None, [], "corpus.jsonl does not exist"),
    "empty": (b"", [], "the corpus is empty: no text in 'text' of"),
    "no text": (b'{"text": ""}\n', [], "the corpus is empty"),
    "invalid JSON": (b'{"text": "a"}\n\n{"text": \n', [], "corpus.jsonl, line 3: invalid JSON"),
    "a list": (b'{"text": "a"}\n[]\n', [], "corpus.jsonl, line 2: expected one JSON object"),
    "no key": (
        b'{"text": "a"}\n{"b": ""}',
        [],
        "corpus.jsonl, line 2: no key 'text' (its keys: 'b'",
    ),
    "no string": (
        b'{"text": 1}\n',
        [],
        "corpus.jsonl, line 1: the value of 'text' is not a string",
    ),
    "not UTF-8": (b'{"text": "a"}\n{"text": "\xff"}\n', [], "corpus.jsonl, line 2: not UTF-8"),
    "surrogate": (b'{"text": "\\ud800"}\n', [], "corpus.jsonl, line 1: 'text' holds half"),
    "second key empty": (b'{"text": "a", "b": ""}', ["--json-keys", "text", "b"], "no text in 'b'"),
    "no such model": (b'{"text": "a"}', ["--tokenizer-model", "none"], "none does not exist"),
    "no model": (b'{"text": "a"}', ["--tokenizer-model", __file__], "is not a SentencePiece model"),
    "not ids": (
        b'{"text": "1"}\n{"text": "x"}\n',
        ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"],
        "corpus.jsonl, line 2: NullTokenizer reads",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_no_file(preprocess, tmp_path, capfd, name):
    content, arguments, message = BAD[name]
    corpus = tmp_path / "corpus.jsonl"
    if content is not None:
        corpus.write_bytes(content)
    assert preprocess(corpus, arguments=arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert outputs(tmp_path) == []


def test_the_first_bad_line_is_reported_from_workers_too(preprocess, tmp_path, capfd):
    lines = [json.dumps({"text": text * 100}) for text in TEXTS]
    lines[40], lines[55] = "{", "["
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(lines))
    assert preprocess(corpus, arguments=["--workers", 2]) == 2
    error = capfd.readouterr().err
    assert "corpus.jsonl, line 41: invalid JSON" in error and error.count("\n") == 1
    assert outputs(tmp_path) == []


def test_plain_text_that_is_not_utf8_names_the_line(preprocess, tmp_path, capfd):
    (tmp_path / "corpus.txt").write_bytes(b"one\ntwo\n\xff\n")
    assert preprocess(tmp_path / "corpus.txt") == 2
    assert "corpus.txt, line 3: not UTF-8" in capfd.readouterr().err


def test_a_failed_run_leaves_the_data_of_the_last_good_one(preprocess, tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", {"text": "one"})
    bad = write_jsonl(tmp_path / "bad.jsonl", {"text": "two"}, [])
    assert preprocess(good) == 0
    before = read(tmp_path / "out" / "P_text_document")
    assert preprocess(bad) == 2
    assert read(tmp_path / "out" / "P_text_document") == before


@pytest.mark.parametrize("flags", [["--workers", "0"], ["--json-keys", "a", "a"]])
def test_impossible_flags(preprocess, tmp_path, flags):
    assert preprocess(tmp_path / "corpus.jsonl", arguments=flags) == 2


BAD_LINES = b'{"text": "one"}\n{\n{"text": "two"}\n{"text": 3}\n{"text": "three"}\n'


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_lines_are_left_out_and_counted(preprocess, tmp_path, model, capfd, workers):
    (tmp_path / "c.ndjson").write_bytes(BAD_LINES)
    flags = ["--on-bad-line", "skip", "--workers", workers]
    assert preprocess(tmp_path / "c.ndjson", arguments=flags) == 0
    tokenize = load_tokenizer("SentencePieceTokenizer", str(model)).tokenize
    assert read(tmp_path / "out" / "P_text_document") == [*map(tokenize, ["one", "two", "three"])]
    note = capfd.readouterr().err
    assert note.startswith("note: 2 bad documents") and "c.ndjson, line 2" in note


def test_only_bad_lines_are_an_empty_corpus(preprocess, tmp_path, capfd):
    (tmp_path / "c.ndjson").write_bytes(b"{\n{\n")
    assert preprocess(tmp_path / "c.ndjson", arguments=["--on-bad-line", "skip"]) == 2
    error = capfd.readouterr().err
    assert "empty" in error and "2 bad documents" in error and error.count("\n") == 1
    assert outputs(tmp_path) == []


def test_documents_begin_and_end_as_asked(preprocess, tmp_path, model):
    corpus = write_jsonl(tmp_path / "c.jsonl", {"text": "a </s> b"}, {"text": ""})
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(model))
    flags = ["--prepend-bos", "--append-eod", "--parse-special-tokens"]
    assert preprocess(corpus, arguments=flags) == 0
    prefix = str(tmp_path / "out" / "P_text_document")
    parts = tokenizer.tokenize("a "), tokenizer.tokenize(" b")
    eod = tokenizer.eod
    assert read(prefix) == [[tokenizer.bos, *parts[0], eod, *parts[1], eod]]
    check_tokenizer(inspect_indexed(prefix), tokenizer)
    made = json.loads(Path(prefix + ".json").read_text())
    assert (made["bos"], made["parse_special_tokens"]) == (tokenizer.bos, True)


@pytest.mark.parametrize("flags", [["--prepend-bos"], ["--parse-special-tokens"]])
def test_what_a_null_tokenizer_has_not(preprocess, tmp_path, capfd, flags):
    corpus = write_jsonl(tmp_path / "c.jsonl", {"text": "1 2"})
    flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"]
    assert preprocess(corpus, arguments=flags) == 2
    assert flags[0] in capfd.readouterr().err


@pytest.mark.parametrize(("room", "copies"), [(4096, 60), (30_000, 3000)], ids=["flush", "write"])
def test_output_that_does_not_fit_leaves_the_old(preprocess, tmp_path, capfd, room, copies):
    """A limit on the size of files stands for a full disk; the first is met by the last flush."""
    small = write_jsonl(tmp_path / "small.jsonl", {"a": "one", "b": "two"})
    keys = ["--json-keys", "a", "b"]
    assert preprocess(small, arguments=keys) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    large = write_jsonl(tmp_path / "large.jsonl", {"a": "one", "b": TEXTS[6] * copies})
    capfd.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        code = preprocess(large, arguments=keys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capfd.readouterr().err
    assert (
        code == EXIT_FAILED and error.startswith("error: cannot write") and error.count("\n") == 1
    )
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def processes_left(group):
    alive = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != "zombie":
                alive.append(process)
    return alive


def feed(pipe, documents):
    """Write `documents`, the last of them for ever, into `pipe` until its reader is gone."""
    *first, last = documents
    with suppress(BrokenPipeError), pipe.open("w") as file:
        for document in itertools.chain(first, itertools.repeat(last)):
            file.write(json.dumps(document) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_stopped_it_leaves_no_data_and_no_process(tmp_path, model, sent):
    # When the first document is written one worker is at a long one. The end never comes.
    corpus = tmp_path / "corpus.jsonl"
    os.mkfifo(corpus)
    texts = [{"text": TEXTS[6] * count} for count in (5000, 50000, 1)]
    threading.Thread(target=feed, args=(corpus, texts), daemon=True).start()
    command = [sys.executable, TOOL, "--input", corpus, "--output-prefix", tmp_path / "out" / "P"]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    process = subprocess.Popen(
        [*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while not any(file.stat().st_size for file in (tmp_path / "out").glob(".P*/part.bin")):
            assert process.poll() is None
            time.sleep(0.02)
        # Ctrl-C reaches the whole group, other signals the one process.
        (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
        error = process.communicate(timeout=60)[1]
    except BaseException:  # it would write for ever
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode != 0
    assert error.count("Traceback") == 0
    if sent == signal.SIGINT:
        assert (process.returncode, error) == (EXIT_INTERRUPTED, "interrupted\n")
    deadline = time.monotonic() + 10
    while processes_left(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_left(process.pid)
    if sent == signal.SIGKILL:  # nobody could clear up, but nothing has the data's name
        assert not [name for name in outputs(tmp_path) if name.startswith("P_")]
    else:
        assert outputs(tmp_path) == []
