from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from fp8lm.data.batches import BatchIterator
from fp8lm.data.datasets import build_datasets
from fp8lm.errors import InputError


class Numbered(Dataset):
    """Item i holds i in every place."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        tokens = torch.full((4,), i)
        return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(4), "dataset_id": 0}


def iterate(size=48, rank=0, world_size=1, consumed_samples=0, num_workers=0, micro=2):
    return BatchIterator(
        Numbered(size),
        micro_batch_size=micro,
        rank=rank,
        world_size=world_size,
        consumed_samples=consumed_samples,
        num_workers=num_workers,
    )


def samples(batches):
    return [batch["tokens"][:, 0].tolist() for batch in batches]


def test_ranks_take_turns_as_in_megatron():
    assert samples(iterate(rank=0, world_size=2).next(2)) == [[0, 1], [4, 5]]
    assert samples(iterate(rank=1, world_size=2).next(2)) == [[2, 3], [6, 7]]


@pytest.mark.parametrize("rank", [0, 1])
def test_samples_are_numbered(rank):
    batches = iterate(rank=rank, world_size=2, consumed_samples=8).next(3)
    for batch in batches:
        assert batch["samples"].tolist() == batch["tokens"][:, 0].tolist()


def test_batches_are_stacked_fields():
    (batch,) = iterate().next(1)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "tokens": (torch.int64, (2, 4)),
        "labels": (torch.int64, (2, 4)),
        "loss_mask": (torch.float32, (2, 4)),
        "samples": (torch.int64, (2,)),
    }


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_equals_uninterrupted_while_the_batch_grows(num_workers, world_size):
    steps = [1, 1, 2, 3, 3]
    whole = iterate(world_size=world_size, rank=world_size - 1)
    expected = [samples(whole.next(step)) for step in steps]
    consumed = sum(steps[:3]) * 2 * world_size
    resumed = iterate(
        world_size=world_size,
        rank=world_size - 1,
        consumed_samples=consumed,
        num_workers=num_workers,
    )
    assert [samples(resumed.next(step)) for step in steps[3:]] == expected[3:]
    assert resumed.consumed_samples == whole.consumed_samples == sum(steps) * 2 * world_size


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_global_rng_is_left_alone(num_workers):
    before = torch.get_rng_state()
    iterate(num_workers=num_workers).next(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_running_out_is_an_error_before_anything_is_taken():
    batches = iterate(size=9)  # the ninth sample is no whole micro-batch
    batches.next(3)
    with pytest.raises(InputError, match="9 samples are used up: 6 consumed, 4 wanted"):
        batches.next(2)
    assert samples(batches.next(1)) == [[6, 7]]


def test_beyond_the_end_there_is_nothing():
    with pytest.raises(InputError, match="used up"):
        iterate(size=4, consumed_samples=10).next(1)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_megatrons_dataset_through_the_iterator(
    make_config, tokenizer, write_documents, num_workers
):
    first = write_documents([list(range(i, i + 25)) for i in range(20)], name="first")
    second = write_documents([list(range(i, i + 9)) for i in range(20)], name="second")
    config = make_config(data_path=[1.0, first, 2.0, second], split="1")
    train, _, _ = build_datasets(config, tokenizer, (24, 0, 0))
    batches = BatchIterator(
        train,
        micro_batch_size=4,
        rank=1,
        world_size=2,
        consumed_samples=8,
        num_workers=num_workers,
    )
    (batch,) = batches.next(1)
    for row, index in enumerate(range(12, 16)):
        assert torch.equal(batch["tokens"][row], train[index]["tokens"])
        assert torch.equal(batch["labels"][row], train[index]["labels"])
