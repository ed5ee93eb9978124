"""Ids outside the vocabulary: found before the run in small files, in their batch in large ones."""

from __future__ import annotations

import os

import numpy as np
import pytest

from fp8lm.data import token_checks
from fp8lm.data.batches import BatchIterator
from fp8lm.data.datasets import build_datasets, check_files
from fp8lm.runtime.errors import InputError

VOCABULARY = 51  # of the fixture `tokenizer`


@pytest.fixture
def outlier(write_documents):
    """A prefix whose third document of three holds one id, beyond what is sampled of it."""

    def write(token, sidecar=False, name="P"):
        long = np.arange(6000) % VOCABULARY
        long[5000] = token
        prefix = write_documents([[1, 2, 3], [4], long], name=name, dtype=np.int32)
        if not sidecar:
            os.remove(prefix + ".json")
        return prefix

    return write


@pytest.fixture
def large_files(monkeypatch):
    """As for files of which not every id is read."""
    monkeypatch.setattr(token_checks, "SCANNED_TOKENS", 0)


@pytest.mark.parametrize("token", [VOCABULARY, 300, -1])
def test_every_id_of_a_small_file_is_read(make_config, tokenizer, outlier, token):
    config = make_config(data_path=[outlier(token)], split="1")
    with pytest.raises(InputError, match=rf"P\.bin holds token id {token} in document 2 "):
        check_files(config, tokenizer, (1, 0, 0))


@pytest.mark.usefixtures("large_files")
def test_of_a_large_file_the_recorded_range_counts(make_config, tokenizer, outlier):
    config = make_config(data_path=[outlier(300, sidecar=True)], split="1")
    with pytest.raises(InputError, match=r"token id 300 in document 2 "):
        check_files(config, tokenizer, (1, 0, 0))
    check_files(make_config(data_path=[outlier(50, sidecar=True)]), tokenizer, (1, 0, 0))


def test_files_are_small_or_large_together(make_config, tokenizer, outlier, monkeypatch):
    prefix, other = outlier(300), outlier(50, name="other")
    monkeypatch.setattr(token_checks, "SCANNED_TOKENS", 6004 + 6003)
    check_files(make_config(data_path=[1.0, prefix, 1.0, other]), tokenizer, (1, 0, 0))
    monkeypatch.setattr(token_checks, "SCANNED_TOKENS", 6004 + 6004)
    with pytest.raises(InputError, match="token id 300"):
        check_files(make_config(data_path=[1.0, prefix, 1.0, other]), tokenizer, (1, 0, 0))


@pytest.mark.usefixtures("process_group", "large_files")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("blended", [False, True])
def test_the_batch_that_holds_it_names_it(make_config, tokenizer, outlier, num_workers, blended):
    good, bad = outlier(50, name="good"), outlier(VOCABULARY, name="bad")
    path = [1.0, good, 1.0, bad] if blended else [bad]
    config = make_config(data_path=path, split="1")
    train, _, _ = build_datasets(config, tokenizer, (700, 0, 0))
    options = {"micro_batch_size": 4, "rank": 0, "world_size": 1, "consumed_samples": 0}
    with (
        BatchIterator(train, **options, num_workers=num_workers) as batches,
        pytest.raises(InputError) as error,
    ):
        batches.next(700 // 4)
    message = str(error.value).strip()
    assert message.startswith("sample ") and "\n" not in message
    assert f"token id {VOCABULARY} in document 2 (from 0) of {bad}" in message


def test_a_changed_id_is_found_by_the_digest(make_config, tokenizer, outlier):
    prefix = outlier(50, sidecar=True)
    with open(prefix + ".bin", "r+b") as stream:
        stream.seek(4000)
        stream.write(b"\x07")
    with pytest.raises(InputError, match=r"P\.bin is not the file that .*P\.json describes"):
        check_files(make_config(data_path=[prefix], split="1"), tokenizer, (1, 0, 0))


def test_a_file_that_cannot_be_read_is_named(make_config, tokenizer, outlier, monkeypatch):
    prefix = outlier(50)

    def fromfile(path, *_args, **_more):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(np, "fromfile", fromfile)
    with pytest.raises(InputError, match=r"cannot read .*P\.bin: Permission denied"):
        check_files(make_config(data_path=[prefix], split="1"), tokenizer, (1, 0, 0))
