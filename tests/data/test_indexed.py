from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from fp8lm.data.indexed import inspect_indexed
from fp8lm.data.indexed_writer import IndexedWriter, token_dtype
from fp8lm.data.token_checks import check_tokenizer
from fp8lm.data.tokenizer import NullTokenizer
from fp8lm.runtime.errors import InputError

DOCUMENTS = [[1, 2, 3], [4], [5, 6]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_is_written(write_documents, dtype):
    prefix = write_documents(DOCUMENTS, dtype=dtype)
    dataset = IndexedDataset(prefix)
    assert [document.tolist() for document in dataset[:]] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    data = inspect_indexed(prefix)
    assert (data.lengths.tolist(), data.num_tokens, data.dtype) == ([3, 1, 2], 6, dtype)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_token_dtype_is_megatrons(vocab_size, dtype):
    assert token_dtype(vocab_size) is dtype


def test_documents_without_ids_are_left_out(write_documents):
    assert inspect_indexed(write_documents([[], [1], []])).lengths.tolist() == [1]


def test_nothing_is_left_of_an_unpublished_write(tmp_path):
    with pytest.raises(KeyboardInterrupt), IndexedWriter(str(tmp_path / "P"), np.uint16) as writer:
        writer.add(np.array([1], np.uint16))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def cut(path, size):
    os.truncate(path, size)


def put(path, offset, data):
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def pipe(path):
    os.remove(path)
    os.mkfifo(path)  # reading it would not end


def dead_link(path):
    os.remove(path)
    os.symlink("unmounted/P", path)


# The header is 34 bytes: magic 9, version 8, dtype 1, sequences 8, marks 8.
DAMAGE = {
    "no bin": (lambda p: os.remove(p + ".bin"), r"P\.bin does not exist"),
    "no idx": (lambda p: os.remove(p + ".idx"), r"P\.idx does not exist"),
    "bin cut": (lambda p: cut(p + ".bin", 10), r"P\.bin is truncated.*10 bytes.*describes 12"),
    "bin empty": (lambda p: cut(p + ".bin", 0), r"P\.bin is truncated"),
    "bin longer": (lambda p: put(p + ".bin", 12, b"xx"), r"P\.bin does not belong"),
    "idx empty": (lambda p: cut(p + ".idx", 0), r"P\.idx is not an index"),
    "idx header cut": (lambda p: cut(p + ".idx", 20), r"P\.idx is truncated"),
    "idx cut": (lambda p: cut(p + ".idx", 60), r"P\.idx is truncated"),
    "idx longer": (lambda p: put(p + ".idx", 102, b"x"), r"P\.idx is corrupt"),
    "magic": (lambda p: put(p + ".idx", 0, b"X"), r"P\.idx is not an index"),
    "version": (lambda p: put(p + ".idx", 9, b"\x02"), r"P\.idx has version 2"),
    "dtype": (lambda p: put(p + ".idx", 17, b"\x63"), r"P\.idx is corrupt: token type 99"),
    "float": (lambda p: put(p + ".idx", 17, b"\x07"), r"P\.idx stores float32"),
    "length": (lambda p: put(p + ".idx", 34, b"\x09"), r"P\.idx is corrupt: lengths"),
    "negative": (lambda p: put(p + ".idx", 34, b"\xff" * 4), r"P\.idx is corrupt: lengths"),
    "mark": (lambda p: put(p + ".idx", 34 + 36 + 24, b"\x09"), r"P\.idx is corrupt: documents"),
    **{
        f"{end} {make.__name__}": (lambda p, e=end, m=make: m(f"{p}.{e}"), rf"P\.{end} is no")
        for end in ("bin", "idx", "json")
        for make in (pipe, dead_link)
    },
    # Files with holes, larger than any memory.
    "idx huge": (lambda p: cut(p + ".idx", 2**42), r"P\.idx is corrupt"),
    "json huge": (lambda p: cut(p + ".json", 2**42), r"P\.json does not name a tokenizer"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_named(write_documents, name):
    damage, message = DAMAGE[name]
    prefix = write_documents(DOCUMENTS)
    damage(prefix)
    with pytest.raises(InputError, match=message):
        inspect_indexed(prefix)


def test_files_without_documents(write_documents):
    with pytest.raises(InputError, match="no tokens"):
        inspect_indexed(write_documents([]))


def test_a_wrong_prefix_gets_a_hint(write_documents, tmp_path):
    prefix = write_documents(DOCUMENTS, name="P_text_document")
    with pytest.raises(InputError, match=r"did you mean .*P_text_document"):
        inspect_indexed(str(tmp_path / "P"))
    with pytest.raises(InputError, match=r"without \.bin"):
        inspect_indexed(prefix + ".bin")


def test_data_of_another_tokenizer_is_refused(write_documents, tokenizer):
    data = inspect_indexed(write_documents(DOCUMENTS))
    check_tokenizer(data, tokenizer)
    with pytest.raises(InputError, match=r"NullTokenizer.*vocabulary 51.*vocabulary 52"):
        check_tokenizer(data, NullTokenizer(51))
    same_size = {**tokenizer.identity, "tokenizer_type": "X", "model_sha256": "abcdef0123456789"}
    data = inspect_indexed(write_documents(DOCUMENTS, identity=same_size))
    with pytest.raises(InputError, match=r"X \(vocabulary 51,.* sha256 abcdef012345\)"):
        check_tokenizer(data, tokenizer)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"tokenizer": 3}', '{"a": ' * 100_000, '{"tokenizer": {}, "max_id": "9"}'],
    ids=range(6),
)
def test_an_unreadable_sidecar_is_named(write_documents, tokenizer, content):
    prefix = write_documents(DOCUMENTS)
    Path(prefix + ".json").write_text(content)
    with pytest.raises(InputError, match=r"P\.json"):
        check_tokenizer(inspect_indexed(prefix), tokenizer)


@pytest.mark.parametrize(("largest", "fits"), [(50, True), (51, False)])
def test_ids_beyond_the_vocabulary_are_found_without_a_sidecar(
    write_documents, tokenizer, largest, fits
):
    prefix = write_documents([[1], [2, largest]])
    os.remove(prefix + ".json")
    data = inspect_indexed(prefix)
    if fits:
        check_tokenizer(data, tokenizer)
    else:
        with pytest.raises(InputError, match=r"P\.bin holds token id 51 in document 1 .*of 51"):
            check_tokenizer(data, tokenizer)


def test_negative_ids_are_found(write_documents, tokenizer):
    data = inspect_indexed(write_documents([[1, -1]], dtype=np.int32))
    with pytest.raises(InputError, match="token id -1"):
        check_tokenizer(data, tokenizer)


def test_the_sidecar_counts(write_documents):
    sidecar = json.loads(Path(write_documents(DOCUMENTS) + ".json").read_text())
    assert (sidecar["documents"], sidecar["tokens"]) == (3, 6)


def marks_of(prefix, marks):
    """Three sequences have their marks after the header, 12 bytes of lengths and 24 of offsets."""
    put(prefix + ".idx", 34 + 36, np.array(marks, "<i8").tobytes())


@pytest.mark.parametrize(
    "marks", [[1, 1, 2, 3], [0, 2, 1, 3], [0, 1, 9, 3], [0, -1, 2, 3], [0, 1, 2, 2], [0, 1, 2, 4]]
)
def test_documents_that_do_not_follow_each_other(write_documents, marks):
    prefix = write_documents(DOCUMENTS)
    os.remove(prefix + ".json")
    marks_of(prefix, marks)
    with pytest.raises(InputError, match=r"P\.idx is corrupt: documents"):
        inspect_indexed(prefix)


def test_megatrons_empty_documents_and_documents_of_several_sequences(write_documents):
    prefix = write_documents(DOCUMENTS)
    os.remove(prefix + ".json")
    marks_of(prefix, [0, 0, 2, 3])
    assert [inspect_indexed(prefix).document_of(token) for token in range(6)] == [1] * 4 + [2] * 2


def test_flipped_bits_of_an_index_are_found(write_documents):
    """With the digest in P.json; without it a document may begin elsewhere, and nothing else."""
    prefix = write_documents(DOCUMENTS)
    content = Path(prefix + ".idx").read_bytes()
    for position in range(0, 8 * len(content), 7):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        Path(prefix + ".idx").write_bytes(damaged)
        with pytest.raises(InputError, match=r"P\.(idx|bin)"):
            inspect_indexed(prefix)


def test_what_tells_data_apart(write_documents):
    first = inspect_indexed(write_documents(DOCUMENTS)).identity
    assert first == inspect_indexed(write_documents(DOCUMENTS, name="Q")).identity
    others = [[1, 2, 3], [4], [5, 7]], [[1, 2, 3, 4], [5, 6]]
    assert all(inspect_indexed(write_documents(other)).identity != first for other in others)
