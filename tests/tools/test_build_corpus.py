from __future__ import annotations

import hashlib
import json
import random
from collections import Counter

import pytest

pytestmark = pytest.mark.slow

DOCUMENTS = {f"module{i}.py": f"'''Number {i}.'''\n" for i in range(20)} | {
    "package/inner.py": "x = 'größe'\n",
    "LICENSE.txt": "Free.\n",
}
LEFT_OUT = {
    "test/test_x.py": "tested = 1\n",
    "package/tests/x.py": "tested = 2\n",
    "site-packages/other/x.py": "other = 1\n",
    "encodings/cp1.py": "table = 1\n",
    "_sysconfigdata__linux.py": "vars = {}\n",
    "lib.so": "binary\n",
    "package/__init__.py": "",
}


@pytest.fixture
def library(tmp_path):
    """A small standard library, its files made in random order."""
    root = tmp_path / "lib"
    files = list((DOCUMENTS | LEFT_OUT).items())
    random.shuffle(files)
    for name, text in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "copy.py").write_text(DOCUMENTS["module3.py"])
    (root / "latin.py").write_bytes(b"# gr\xf6sse\n")
    (root / "pydoc_data").mkdir()
    (root / "pydoc_data" / "topics.py").write_text("# made by\ntopics = {'if': 'The \"if\"\\n'}\n")
    return root


def test_collects_text_once_and_counts_the_rest(tool, library):
    counts = Counter()
    documents = dict(tool("build_corpus").collect(library, counts))
    # Of a file and its copy, either may be the one that stays.
    copies = {"copy.py", "module3.py"}
    assert len(copies & set(documents)) == 1
    assert set(documents) - copies == {*DOCUMENTS, "pydoc_data/topics.py/if"} - copies
    assert documents["pydoc_data/topics.py/if"] == 'The "if"\n'
    assert counts == {"duplicates": 1, "empty": 1, "undecodable": 1, "documents": 23}


def test_order_is_that_of_the_paths_hashes(tool, library):
    paths = [path for path, _ in tool("build_corpus").collect(library, Counter())]
    assert paths == sorted(paths, key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    assert paths != sorted(paths)


def test_this_python_has_a_corpus(run_tool, tmp_path, capsys):
    assert run_tool("build_corpus", "--output", tmp_path / "new" / "dir", "--max-mb", 0.5) == 0
    lines = (tmp_path / "new" / "dir" / "corpus.jsonl").read_text().splitlines()
    documents = [json.loads(line) for line in lines]
    size = sum(len(document["text"].encode()) for document in documents)
    assert 0.3e6 < size <= 0.5e6
    assert f"{len(documents)} documents, {size / 1e6:.1f} MB" in capsys.readouterr().out


def test_no_text_is_an_error_without_a_file(run_tool, tmp_path, capsys):
    assert run_tool("build_corpus", "--output", tmp_path / "out", "--max-mb", 0) == 2
    assert capsys.readouterr().err.startswith("error: no text found")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_made(run_tool, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run_tool("build_corpus", "--output", tmp_path / "file", "--max-mb", 0.1) == 2
    assert f"cannot write to {tmp_path / 'file'}" in capsys.readouterr().err
