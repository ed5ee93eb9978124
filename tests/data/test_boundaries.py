"""Documents of a sample, against megatron-core's own masks and positions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fp8lm.batch import Documents
from fp8lm.data.boundaries import document_starts
from fp8lm.data.datasets import build_datasets, check_files
from fp8lm.kernels.attention import DocumentMask
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.quiet import quiet_megatron

with quiet_megatron():
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

ADDED = {"reset_position_ids": "position_ids", "reset_attention_mask": "document_starts"}
BOTH = {"reset_position_ids": True, "reset_attention_mask": True}


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        ([1, 2, 3, 4, 5], [0, 0, 0, 0, 0]),
        ([9, 1, 2, 3, 9], [0, 1, 1, 1, 1]),
        ([1, 9, 9, 9, 2], [0, 0, 2, 3, 4]),
        ([9, 9, 9, 9, 9], [0, 1, 2, 3, 4]),
        ([9], [0]),
    ],
)
def test_an_end_belongs_to_its_document(tokens, starts):
    assert document_starts(torch.tensor(tokens), eod=9).tolist() == starts


@pytest.fixture
def uneven(write_documents, tokenizer):
    """Documents of 1 to 9 tokens, each with its end, some of which are nothing else."""
    documents = [[i % 50] * max(0, i % 11 - 2) + [tokenizer.eod] for i in range(60)]
    return write_documents(documents, append_eod=True)


@pytest.mark.usefixtures("process_group")
def test_masks_positions_and_order_are_megatrons(make_config, tokenizer, uneven):
    wanted = make_config(data_path=[uneven], split="1", eod_mask_loss=True, **BOTH)
    train, _, _ = build_datasets(wanted, tokenizer, (12, 0, 0))
    settings = GPTDatasetConfig(
        random_seed=wanted.shuffle_seed,
        sequence_length=wanted.model.seq_length,
        blend=([uneven], None),
        split="1",
        tokenizer=SimpleNamespace(
            eod=tokenizer.eod, vocab_size=tokenizer.vocab_size, unique_identifiers={}
        ),
        eod_mask_loss=True,
        create_attention_mask=True,
        **BOTH,
    )
    with quiet_megatron():
        builder = BlendedMegatronDatasetBuilder(GPTDataset, (12, 0, 0), lambda: True, settings)
        theirs = builder.build()[0]
    at_ends = set()
    for i in range(12):
        item, their = train[i], theirs[i]
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(item[name], their[name]), name
        scores = DocumentMask.additive(Documents.from_starts(item["document_starts"][None])).scores
        assert torch.equal(scores[0].isneginf(), their["attention_mask"])
        is_end = item["tokens"] == tokenizer.eod
        in_a_row = bool((is_end[1:] & is_end[:-1]).any())
        at_ends |= {("first", bool(is_end[0])), ("last", bool(is_end[-1])), ("row", in_a_row)}
    assert {(place, True) for place in ("first", "last", "row")} <= at_ends


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("keys", [BOTH, {"reset_position_ids": True}, {}], ids=len)
@pytest.mark.parametrize("mock", [False, True])
def test_items_have_what_is_asked_for(keys, mock, make_config, tokenizer, uneven):
    source = {"mock_data": True} if mock else {"data_path": [uneven], "split": "1"}
    (train, _, _), (plain, _, _) = (
        build_datasets(make_config(**source, **k), tokenizer, (8, 0, 0)) for k in (keys, {})
    )
    assert len(train) == len(plain)
    for i in range(8):
        item, own = train[i], plain[i]
        starts = document_starts(item["tokens"], tokenizer.eod)
        expected = {"position_ids": torch.arange(len(starts)) - starts, "document_starts": starts}
        assert item.keys() - own.keys() == {ADDED[key] for key in keys}
        assert all(torch.equal(item[ADDED[key]], expected[ADDED[key]]) for key in keys)
        assert own.keys() == {"tokens", "labels", "loss_mask"}
        assert all(torch.equal(item[name], own[name]) for name in own)
        assert mock or starts.any()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("key", BOTH)
def test_documents_without_an_end_are_refused(
    key, recorded, make_config, tokenizer, write_documents, uneven, tmp_path
):
    prefix = write_documents([[1] * 20] * 4, name="endless")
    if not recorded:
        (tmp_path / "endless.json").unlink()
        (tmp_path / "P.json").unlink()
    for path, refused in ((prefix, True), (uneven, False)):
        config = make_config(data_path=[path], split="1", **{key: True})
        if refused:
            with pytest.raises(InputError, match=r"endless has no end-of-document .*append-eod"):
                check_files(config, tokenizer, (1, 0, 0))
        else:
            check_files(config, tokenizer, (1, 0, 0))
