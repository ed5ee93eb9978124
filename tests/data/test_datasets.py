from __future__ import annotations

import errno
import logging
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fp8lm.config import load_config
from fp8lm.data.datasets import blend_of, build_datasets, check_files
from fp8lm.data.tokenizer import NullTokenizer
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.quiet import quiet_megatron

with quiet_megatron():
    from megatron.core.datasets.utils import get_blend_from_list

pytestmark = pytest.mark.usefixtures("process_group")

SEQ = 16
ROOT = Path(__file__).parents[2]


@pytest.fixture
def counting(write_documents):
    """20 documents of 20 ids: document i counts up from i, modulo 50."""
    return write_documents([[(i + j) % 50 for j in range(20)] for i in range(20)])


def test_samples_are_the_documents_tokens(make_config, tokenizer, write_documents):
    text = np.random.default_rng(0).permutation(50)[: SEQ + 1].tolist()
    prefix = write_documents([text])
    train, valid, test = build_datasets(
        make_config(data_path=[prefix], split="1"), tokenizer, (1, 0, 0)
    )
    assert valid is None and test is None
    item = train[0]
    assert item["tokens"].tolist() == text[:-1]
    assert item["labels"].tolist() == text[1:]
    assert item["loss_mask"].tolist() == [1.0] * SEQ
    assert item.keys() == {"tokens", "labels", "loss_mask"}  # positions are the model's
    assert item["tokens"].dtype == item["labels"].dtype == torch.int64


@pytest.mark.parametrize("documents", [10, 11])
def test_how_many_documents_the_pages_ask_for(documents, make_config, tokenizer, write_documents):
    """For the split of the config that they train with."""
    prefix = write_documents([list(range(20))] * documents)
    quickstart = load_config(ROOT / "configs/quickstart.yaml", [])
    config = make_config(data_path=[prefix], split=quickstart.data.split)
    if documents < 11:
        with pytest.raises(InputError, match=r"\(10 documents\) for valid"):
            check_files(config, tokenizer, (1, 1, 0))
    else:
        check_files(config, tokenizer, (1, 1, 0))
    assert "11 files or more" in (ROOT / "README.md").read_text()
    page = ROOT / "docs/user-guide/data.md"
    assert f'`"{quickstart.data.split}"` needs 11' in page.read_text()


def test_labels_are_the_tokens_shifted_by_one(make_config, tokenizer, counting):
    train, _, _ = build_datasets(make_config(data_path=[counting]), tokenizer, (30, 0, 0))
    assert len(train) >= 30
    for i in range(30):
        assert torch.equal(train[i]["tokens"][1:], train[i]["labels"][:-1])


@pytest.mark.parametrize("masked", [False, True])
def test_eod_mask_loss_leaves_out_what_follows_a_document(
    make_config, tokenizer, write_documents, masked
):
    prefix = write_documents([[*range(10), tokenizer.eod], [*range(10, 20), tokenizer.eod]])
    config = make_config(data_path=[prefix], split="1", eod_mask_loss=masked)
    train, _, _ = build_datasets(config, tokenizer, (4, 0, 0))
    for i in range(4):
        at_eod = train[i]["tokens"] == tokenizer.eod
        assert at_eod.any()
        assert torch.equal(train[i]["loss_mask"] == 0, at_eod & masked)


def test_splits_hold_different_documents(make_config, tokenizer, write_documents):
    prefix = write_documents([[i] * 20 for i in range(20)])
    config = make_config(data_path=[prefix], split="60,20,20")
    parts = build_datasets(config, tokenizer, (12, 4, 4))
    seen = [{int(token) for i in range(len(part)) for token in part[i]["tokens"]} for part in parts]
    assert seen[0] <= set(range(12)) and seen[1] <= set(range(12, 16))
    assert seen[2] <= set(range(16, 20)) and all(seen)


def test_blend_follows_the_weights(make_config, tokenizer, write_documents, tmp_path):
    ones = write_documents([[1] * 50] * 4, name="ones")
    twos = write_documents([[2] * 50] * 4, name="twos")
    config = make_config(
        data_path=[3.0, ones, 1, twos], split="50,50,0", data_cache_path=str(tmp_path / "cache")
    )
    for _ in range(2):  # built, then read from the cache
        train, valid, _ = build_datasets(config, tokenizer, (40, 8, 0))
        first = [int(train[i]["tokens"][0]) for i in range(40)]
        assert first.count(1) == 30 and first.count(2) == 10
        assert len(valid) >= 8


def test_a_blend_without_weights_has_each_sample_once(make_config, tokenizer, write_documents):
    ones = write_documents([[1] * 16] * 4 + [[1]], name="ones")
    twos = write_documents([[2] * 16] * 7 + [[2]], name="twos")
    config = make_config(data_path=[ones, twos], split="1")
    train, _, _ = build_datasets(config, tokenizer, (11, 0, 0))
    assert sorted(int(train[i]["tokens"][0]) for i in range(11)) == [1] * 4 + [2] * 7
    with pytest.raises(InputError, match=r"11 samples for train, which wants 12: give weights"):
        check_files(config, tokenizer, (12, 0, 0))


def test_evaluations_read_a_blend_without_weights_again(make_config, tokenizer, write_documents):
    files = [write_documents([[1] * 17] * 20, name=name) for name in "ab"]
    config = make_config(data_path=files, split="50,50", eval_iters=20)
    _, valid, _ = build_datasets(config, tokenizer, (20, 60, 0))
    assert len(valid) == 20
    config = make_config(data_path=files, split="50,50", eval_iters=21)
    with pytest.raises(InputError, match=r"20 samples for valid, which wants 21"):
        check_files(config, tokenizer, (20, 63, 0))


def test_a_file_of_less_than_a_sample_needs_a_weight(make_config, tokenizer, write_documents):
    large, small = write_documents([[1] * 33], name="P"), write_documents([[2] * 16], name="small")
    with pytest.raises(InputError, match=r"small .*16 tokens"):
        check_files(make_config(data_path=[large, small], split="1"), tokenizer, (2, 0, 0))
    check_files(make_config(data_path=[1, large, 1, small], split="1"), tokenizer, (2, 0, 0))


def test_a_weight_of_zero_leaves_a_prefix_out(make_config, tokenizer, write_documents):
    ones = write_documents([[1] * 50] * 4, name="ones")
    config = make_config(data_path=[0, "not there", 0.5, ones], split="1")
    train, _, _ = build_datasets(config, tokenizer, (40, 0, 0))
    assert {int(train[i]["tokens"][0]) for i in range(40)} == {1}


@pytest.mark.parametrize("blend", [["a"], [0.5, "a"], ["a", "b"], [0.3, "a", 0.7, "b"]])
def test_a_blend_is_what_megatron_makes_of_it(blend):
    assert blend_of(blend) == get_blend_from_list([str(item) for item in blend])


def test_the_order_is_the_seeds(make_config, tokenizer, counting):
    def order(seed, **data):
        config = make_config(seed=seed, data_path=[counting], **data)
        train, _, _ = build_datasets(config, tokenizer, (30, 0, 0))
        return [train[i]["tokens"].tolist() for i in range(30)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1, shuffle_seed=2) == order(3, shuffle_seed=2) == order(2)


def test_cache_is_used_and_not_after_the_data_changed(
    make_config, tokenizer, write_documents, tmp_path
):
    cache = tmp_path / "cache"

    def build(documents):
        prefix = write_documents(documents)
        config = make_config(data_path=[prefix], split="1", data_cache_path=str(cache))
        return build_datasets(config, tokenizer, (3, 0, 0))[0]

    build([[1] * 40])
    files = sorted(cache.iterdir())
    stamps = [file.stat().st_mtime_ns for file in files]
    build([[2] * 40])
    assert [file.stat().st_mtime_ns for file in sorted(cache.iterdir())] == stamps
    changed = build([[3] * 5, [4] * 7])
    assert set(changed[0]["tokens"].tolist()) == {3, 4}
    assert len(sorted(cache.iterdir())) == 2 * len(files)


def test_a_small_corpus_is_repeated(make_config, tokenizer, write_documents):
    prefix = write_documents([[1, 2, 3]])
    train, _, _ = build_datasets(make_config(data_path=[prefix], split="1"), tokenizer, (10, 0, 0))
    assert train[9]["tokens"].tolist()[:3] == [1, 2, 3]


@pytest.mark.parametrize("split", ["99,1,0", "1", "1,0,1"])
def test_a_split_without_documents_is_an_error_and_not_an_endless_loop(
    make_config, tokenizer, write_documents, split
):
    prefix = write_documents([[1] * 40, [2] * 40])
    config = make_config(data_path=[prefix], split=split)
    with pytest.raises(InputError, match=r"data\.split .* no documents of .* for valid"):
        build_datasets(config, tokenizer, (1, 1, 0))
    assert build_datasets(config, tokenizer, (1, 0, 0))[0] is not None


def test_split_in_any_notation(make_config, tokenizer, counting):
    config = make_config(data_path=[counting], split="9e1, 1e1")
    train, valid, _ = build_datasets(config, tokenizer, (2, 1, 0))
    assert (len(train.dataset.indices), len(valid.dataset.indices)) == (18, 2)


def test_bad_data_is_one_message(make_config, tokenizer, counting):
    os.truncate(counting + ".bin", 100)
    with pytest.raises(InputError, match=r"P\.bin is truncated"):
        build_datasets(make_config(data_path=[counting]), tokenizer, (1, 0, 0))


def test_data_of_another_tokenizer_is_refused(make_config, counting):
    with pytest.raises(InputError, match="tokenized with NullTokenizer"):
        build_datasets(make_config(data_path=[counting]), NullTokenizer(60), (1, 0, 0))


def test_a_cache_that_cannot_be_written_is_named(make_config, tokenizer, counting, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = make_config(data_path=[counting], data_cache_path=str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"data\.data_cache_path"):
        build_datasets(config, tokenizer, (1, 0, 0))


def test_too_few_open_files_are_not_blamed_on_the_cache(
    make_config, tokenizer, counting, monkeypatch
):
    def build(builder):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "counting.idx")

    builder = "megatron.core.datasets.blended_megatron_dataset_builder"
    monkeypatch.setattr(f"{builder}.BlendedMegatronDatasetBuilder.build", build)
    with pytest.raises(OSError, match="Too many open files"):
        build_datasets(make_config(data_path=[counting]), tokenizer, (1, 0, 0))


def test_a_damaged_cache_is_named(make_config, tokenizer, counting, tmp_path):
    config = make_config(data_path=[counting], data_cache_path=str(tmp_path / "cache"))
    build_datasets(config, tokenizer, (1, 0, 0))
    for file in Path(tmp_path / "cache").glob("*.npy"):
        os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(InputError, match=r"cache: .*: remove that folder"):
        build_datasets(config, tokenizer, (1, 0, 0))


def test_quiet_is_not_for_ever():
    logger = logging.getLogger("megatron")
    before = logger.level, list(warnings.filters)
    with quiet_megatron():
        assert not logger.isEnabledFor(logging.WARNING)
    assert (logger.level, list(warnings.filters)) == before
