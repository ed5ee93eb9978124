"""Samples of tuning: packing, order, epochs, held-out data, and where examples come from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8lm.data.best_fit import pack_best_fit
from fp8lm.data.conversations import MaskedTokens
from fp8lm.data.datasets import build_datasets
from fp8lm.data.examples import Examples
from fp8lm.data.packed_examples import PackedExamples, Selection
from fp8lm.runtime.errors import InputError
from tests.data.chats import BRACKETS, LINES, SIZES, sentencepiece, sft_config, turns, write_lines

CAPACITY = 16


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40))
def test_every_item_is_packed_once_and_bins_hold_what_they_can(sizes):
    bins = pack_best_fit(sizes, CAPACITY)
    assert sorted(item for each in bins for item in each) == list(range(len(sizes)))
    filled = [sum(sizes[item] for item in each) for each in bins]
    assert max(filled) <= CAPACITY
    # A bin is begun only when no earlier one has room.
    for number, each in enumerate(bins):
        assert all(filled[other] + sizes[each[0]] > CAPACITY for other in range(number))


def test_the_fullest_bin_with_room_is_taken():
    assert pack_best_fit([10, 9, 7, 6], CAPACITY) == [[0, 3], [1, 2]]


def examples(lengths, per_document=1):
    """Sequence i holds ids 100 i, 100 i + 1, ...; its last two tokens are the answer."""

    def read(i):
        mask = np.zeros(lengths[i], np.uint8)
        mask[-2:] = 1
        return MaskedTokens(100 * i + np.arange(lengths[i]), mask)

    form = ("chat", "preference")[per_document - 1]
    return Examples("list", form, np.array(lengths), read, str)


def packed(lengths, per_document=1, *, size=20, split=0, packing=True):
    source = examples(lengths, per_document)
    places = np.array([(0, i) for i in range(source.num_documents)])
    chosen = Selection([source], places, source.sizes)
    return PackedExamples(
        chosen, seq_length=CAPACITY, pad=1, seed=3, split=split, size=size, packing=packing
    )


def test_a_sample_is_whole_examples_that_do_not_see_each_other():
    item = packed([9, 5, 4])[0]
    assert item["tokens"].tolist() == [*range(8), *range(100, 104), *range(200, 203), 1]
    assert item["labels"].tolist() == [*range(1, 9), *range(101, 105), *range(201, 204), 1]
    assert item["loss_mask"].nonzero().flatten().tolist() == [6, 7, 10, 11, 13, 14]
    assert item["position_ids"].tolist() == [*range(8), *range(4), *range(3), 0]
    assert item["document_starts"].tolist() == [0] * 8 + [8] * 4 + [12] * 3 + [15]


def test_both_answers_of_a_preference_are_in_one_sample():
    dataset = packed([5, 6, 4, 4, 8, 8], per_document=2)
    assert dataset.samples_per_epoch == 2
    for item in (dataset[0], dataset[1]):
        firsts = item["tokens"][item["position_ids"] == 0].tolist()
        assert {first // 200 for first in firsts if first != 1} in ({0, 1}, {2})


def test_without_packing_a_sample_has_one_example_and_no_documents():
    dataset = packed([9, 5, 4], packing=False)
    assert dataset.samples_per_epoch == 3
    assert set(dataset[0]) == {"tokens", "labels", "loss_mask"}


def test_an_epoch_reads_every_sample_once_in_an_order_of_its_own():
    dataset = packed([17] * 8, size=24)
    firsts = [int(dataset[i]["tokens"][0]) // 100 for i in range(24)]
    epochs = [firsts[i : i + 8] for i in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert firsts == [int(packed([17] * 8, size=24)[i]["tokens"][0]) // 100 for i in range(24)]


def test_held_out_examples_count_once():
    dataset = packed([17] * 3, size=8, split=1)
    counted = [dataset[i]["loss_mask"].sum().item() for i in range(8)]
    assert counted == [2, 2, 2, 0, 0, 0, 0, 0]


@pytest.fixture
def tokenizer(tmp_path):
    return sentencepiece(tmp_path)


def test_long_examples_and_bad_lines_end_the_run_or_are_left_out(tokenizer, tmp_path):
    def config_of(tuning, **data):
        return sft_config(tmp_path, [lines], tuning, **data)

    (tmp_path / "t.jinja").write_text(BRACKETS)
    brackets = {"chat_template": str(tmp_path / "t.jinja")}
    long = {"messages": turns("def " * 70, "yield")}
    lines = write_lines(tmp_path / "x.jsonl", *LINES[:3], long, {"messages": []}, *LINES)
    with pytest.raises(InputError, match=r"line 5: no list of messages"):
        build_datasets(config_of(brackets), tokenizer, SIZES)
    skipping = brackets | {"on_bad_line": "skip"}
    with pytest.raises(InputError, match=r"line 4: \d+ tokens, and a sample has 64 \(model\.seq"):
        build_datasets(config_of(skipping), tokenizer, SIZES)
    skipping |= {"on_long_example": "skip"}
    train, valid, _ = build_datasets(config_of(skipping), tokenizer, SIZES)
    said = train.describe()
    assert "18 examples" in said and "1 long example is left out" in said and "line 4: " in said
    assert "1 bad document is left out, the first:" in said
    assert "line 5: no list of messages" in said and valid is not None
    with pytest.raises(InputError, match="leaves no examples for valid"):
        build_datasets(config_of(skipping, split="99,1,0"), tokenizer, SIZES)
