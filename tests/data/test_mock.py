from __future__ import annotations

import numpy as np
import pytest
import torch

from fp8lm.data.datasets import build_datasets
from fp8lm.data.mock import MockDataset

VOCAB = 64


def mock(size=64, seed=1, split=0, **rest):
    return MockDataset(
        vocab_size=VOCAB, seq_length=128, seed=seed, split=split, size=size, eod=VOCAB - 1, **rest
    )


def test_an_item_depends_on_seed_split_and_index_alone():
    item = mock()[3]
    assert torch.equal(mock(size=4)[3]["tokens"], item["tokens"])
    for other in (mock()[4], mock(seed=2)[3], mock(split=1)[3]):
        assert not torch.equal(other["tokens"], item["tokens"])


def test_items_look_like_gpt_datasets():
    item = mock()[0]
    assert torch.equal(item["tokens"][1:], item["labels"][:-1])
    assert {key: (value.dtype, value.shape) for key, value in item.items()} == {
        "tokens": (torch.int64, (128,)),
        "labels": (torch.int64, (128,)),
        "loss_mask": (torch.float32, (128,)),
    }
    assert set(item["tokens"].tolist()) <= set(range(VOCAB))
    with pytest.raises(IndexError):
        mock(size=2)[2]


def test_eod_is_masked_on_request():
    dataset = mock(eod_mask_loss=True)
    at_eod = torch.stack([dataset[i]["tokens"] == VOCAB - 1 for i in range(64)])
    masked = torch.stack([dataset[i]["loss_mask"] == 0 for i in range(64)])
    assert at_eod.any() and torch.equal(at_eod, masked)


def cross_entropy(probabilities, tokens, labels):
    return -np.log(probabilities[tokens, labels]).mean()


def test_structure_learnt_on_train_holds_on_valid():
    """Counting pairs on train predicts valid far better than chance, and than frequencies do."""
    train, valid = (
        [torch.cat([part[i][key] for i in range(64)]).numpy() for key in ("tokens", "labels")]
        for part in (mock(split=0), mock(split=1))
    )
    pairs = np.full((VOCAB, VOCAB), 0.05)
    np.add.at(pairs, tuple(train), 1)
    uniform = np.log(VOCAB)
    frequencies = np.tile(pairs.sum(0) / pairs.sum(), (VOCAB, 1))
    unigram = cross_entropy(frequencies, *valid)
    bigram = cross_entropy(pairs / pairs.sum(1, keepdims=True), *valid)
    assert unigram < 0.95 * uniform
    assert bigram < 0.5 * uniform


def test_from_the_config(make_config, tokenizer):
    config = make_config(mock_data=True)
    train, valid, test = build_datasets(config, tokenizer, (5, 3, 0))
    assert (len(train), len(valid), test) == (5, 3, None)
    assert not torch.equal(train[0]["tokens"], valid[0]["tokens"])
