"""What a corpus file may be, and what is said of one that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import signal
import time
from functools import partial
from multiprocessing import active_children

import pytest
from backports import zstd

from fp8lm.data import documents
from fp8lm.data.documents import BadDocument, check_inputs, parse_record, read_records
from fp8lm.data.encode import EncodeSettings, encode_records
from fp8lm.runtime.errors import InputError, RunFailed

TEXTS = ["first", "second größe", "third"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
COMPRESSION = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    # As the command `zstd` does; without a checksum nothing tells changed data.
    "zstd": partial(zstd.compress, options={zstd.CompressionParameter.checksum_flag: 1}),
}


@pytest.fixture
def texts_of(tmp_path):
    """The texts of one file of this name and content."""

    def read(content, name="corpus", split_lines=False, input_format="auto"):
        (tmp_path / name).write_bytes(content)
        records = read_records([tmp_path / name], split_lines, input_format)
        return [parse_record(record, ["text"])["text"] for record in records]

    return read


@pytest.mark.parametrize("name", ["c.jsonl", "c.NDJSON", "c.json", "c.txt", "c", "c.data"])
def test_json_lines_under_any_name(texts_of, name):
    assert texts_of(LINES, name) == TEXTS
    assert texts_of(LINES.replace(b"\n", b"\r\n"), name) == TEXTS
    assert texts_of(b"\xef\xbb\xbf\n \n" + LINES, name) == TEXTS


@pytest.mark.parametrize("kind", COMPRESSION)
@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c"])
def test_compressed_under_any_name(texts_of, kind, name):
    compress = COMPRESSION[kind]
    assert texts_of(compress(LINES), name) == TEXTS
    many = b"".join(compress(line) for line in LINES.splitlines(keepends=True))
    assert texts_of(many, name) == TEXTS


def test_compressed_text(texts_of):
    content = b"\xef\xbb\xbfone\ntwo\n"
    assert texts_of(zstd.compress(content), "book.txt.zst") == ["one\ntwo\n"]
    assert texts_of(gzip.compress(content), "book", split_lines=True) == ["one", "two"]


@pytest.mark.parametrize("kind", COMPRESSION)
@pytest.mark.parametrize("damage", ["cut", "changed", "second", "empty second"])
def test_damaged_archives_are_named(texts_of, kind, damage):
    """None is taken for a shorter one."""
    content = COMPRESSION[kind](os.urandom(3000).hex().encode() + b"\n")
    middle = len(content) // 2
    damaged = {
        "cut": content[:-4],
        "changed": content[:middle] + b"\xff\x00\xff\x00" + content[middle + 4 :],
        "second": content + b"garbage" + content,
        "empty second": content + content[:3],
    }[damage]
    with pytest.raises(InputError, match=r"corpus is damaged") as error:
        texts_of(damaged, split_lines=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04\x14\x00", "zip"),
        (b"PAR1\x15\x04", "Parquet"),
        ("größe".encode("utf-16"), "UTF-16"),
        (b"\x00" * 257 + b"ustar\x0000", "tar"),
    ],
)
@pytest.mark.parametrize("name", ["c.jsonl", "c"])
def test_other_formats_are_named(texts_of, content, what, name):
    with pytest.raises(InputError, match=what):
        texts_of(content, name)
    with pytest.raises(InputError, match=what):
        texts_of(gzip.compress(content), name)


@pytest.mark.parametrize("text", ["{\\begin{a}\n}", "[a](b)", "{ int x; }", "'{'", "", "{{x}}"])
def test_text_that_is_no_json(texts_of, text):
    assert texts_of(text.encode()) == [text]


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"',
        '{\n  "text": "a"\n}',
        '[{"text": "a"}]',
        "[\n{",
        "{'text': 'a'}",
        " " * 99999 + LINES.decode(),
    ],
)
def test_what_begins_like_json_is_never_text_by_itself(texts_of, content):
    with pytest.raises(InputError, match="--input-format"):
        texts_of(content.encode())
    assert texts_of(content.encode(), input_format="text") == [content]


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c"])
@pytest.mark.parametrize(
    "content", ['[\n{"text": "a"},\n{"text": "b"}\n]\n', '[{"text": "a"},\n{}]']
)
def test_a_json_list_is_no_bad_line(texts_of, content, name):
    """Without its last item's comma, that would be the only line to read."""
    with pytest.raises(InputError, match="one JSON list") as error:
        texts_of(content.encode(), name)
    assert not isinstance(error.value, BadDocument)


def test_the_format_can_be_said(texts_of):
    assert texts_of(LINES, "c.jsonl", input_format="text") == [LINES.decode()]
    assert texts_of(LINES, "c.jsonl", True, "text") == LINES.decode().splitlines()
    with pytest.raises(InputError, match="line 1: invalid JSON"):
        texts_of(b"plain", "c.txt", input_format="jsonl")


BAD_LINES = {
    "invalid JSON": b'{"text": ',
    "expected one JSON object": b'["a"]',
    "no key 'text'": b'{"body": ""}',
    "is not a string": b'{"text": 1}',
    "surrogate": b'{"text": "\\ud83d"}',
    "digits": b'{"text": "a", "n": ' + b"1" * 5000 + b"}",
    "nested": b'{"text": "a", "n": ' + b"[" * 200_000,
    "not UTF-8": b'{"text": "\xff"}',
    "control character": b'{"text": "\x00"}',
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_line_is_named(texts_of, what):
    with pytest.raises(BadDocument, match=what) as error:
        texts_of(b'{"text": "good"}\n\n' + BAD_LINES[what] + b"\n" + LINES)
    message = str(error.value)
    assert "corpus, line 3: " in message and "\n" not in message and len(message) < 300


@pytest.mark.parametrize(
    ("content", "split_lines", "what"),
    [
        (b"one\ntw\x00o", False, "line 2: a NUL byte"),
        (b"one\ntw\x00o", True, "line 2: a NUL byte"),
        (b"one\ntw\xffo", False, "line 2: not UTF-8"),
    ],
)
def test_bytes_that_are_no_text(texts_of, content, split_lines, what):
    with pytest.raises(BadDocument, match=what):
        texts_of(content, split_lines=split_lines)


def test_documents_beyond_the_limit(texts_of, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 40)
    assert texts_of(b"x" * 40) == ["x" * 40]
    with pytest.raises(BadDocument, match="split-lines"):
        texts_of(b"x" * 41)
    with pytest.raises(BadDocument, match="line 2: a document of more"):
        texts_of(b"a\n" + b"x" * 100 + b"\nb\n", split_lines=True)


def test_inputs_that_are_no_files(tmp_path):
    for path, what in ((tmp_path, "folder"), ("/dev/zero", "neither"), ("none", "not exist")):
        with pytest.raises(InputError, match=what):
            check_inputs([str(path)])


def test_a_file_that_cannot_be_read():
    with pytest.raises(InputError, match="cannot read /proc/self/mem: Input/output error"):
        list(read_records(check_inputs(["/proc/self/mem"])))


def test_a_pipe_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    if not (child := os.fork()):
        (tmp_path / "pipe").write_bytes(gzip.compress(LINES))
        os._exit(0)
    records = read_records(check_inputs([str(tmp_path / "pipe")]))
    assert [parse_record(record, ["text"])["text"] for record in records] == TEXTS
    os.waitpid(child, 0)


def test_a_worker_that_dies_is_one_error(tmp_path):
    (tmp_path / "c").write_bytes(LINES)
    (record, *_) = read_records([tmp_path / "c"])
    before = set(active_children())

    def records():
        while True:
            yield from [record] * 20_000
            for worker in active_children():
                if worker not in before:
                    os.kill(worker.pid, signal.SIGKILL)

    settings = EncodeSettings("NullTokenizer", None, 9, ("text",), False, "int32", skip_bad=True)
    with pytest.raises(RunFailed, match="worker process died"):
        for _ in encode_records(records(), settings, workers=2):
            pass
    deadline = time.monotonic() + 20
    while set(active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(active_children()) <= before
