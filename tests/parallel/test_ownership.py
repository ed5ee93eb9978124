"""Who owns what: Algorithm 1, row blocks, and that every row has one owner."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from fp8lm.parallel.ownership import Tensor2D, row_blocks, whole_tensors

LAYER = [("qkv", 192, 64), ("proj", 64, 64), ("fc1", 256, 64), ("fc2", 64, 256), ("norm", 64, 2)]
MODEL = [Tensor2D("table", 512, 128)] + [
    Tensor2D(f"{layer}.{name}", rows, row_bytes)
    for layer in range(6)
    for name, rows, row_bytes in LAYER
]


def owners(ownership, name, rows):
    """The owner of every row."""
    found = [None] * rows
    for rank, own in enumerate(ownership.rows):
        start, stop = own.get(name, (0, 0))
        for row in range(start, stop):
            assert found[row] is None
            found[row] = rank
    return found


@pytest.mark.parametrize("place", [whole_tensors, row_blocks])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8, 64])
def test_every_row_has_one_owner_and_lies_in_its_slab(place, num_ranks):
    ownership = place(MODEL, num_ranks)
    taken = []
    for tensor in MODEL:
        start = ownership.start[tensor.name]
        assert start % 16 == 0
        taken.append((start, start + tensor.nbytes))
        for row, owner in enumerate(owners(ownership, tensor.name, tensor.rows)):
            first = start + row * tensor.row_bytes
            last = first + tensor.row_bytes - 1
            assert first // ownership.slab_bytes == last // ownership.slab_bytes == owner
    taken.sort()
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(taken))
    assert taken[-1][1] <= num_ranks * ownership.slab_bytes


def test_algorithm_1_by_hand():
    sizes = {"a": 70, "b": 60, "c": 30, "d": 30, "e": 20, "f": 10}
    tensors = [Tensor2D(name, size, 16) for name, size in sizes.items()]
    rows = whole_tensors(tensors, 3).rows
    # a | b | c, then d to c's rank (60), e to b's (60 each: the first of the least), f to c's.
    assert [set(own) for own in rows] == [{"a"}, {"b", "e"}, {"c", "d", "f"}]


def test_whole_tensors_stay_whole():
    assert all(
        owned == (0, tensor.rows)
        for own in whole_tensors(MODEL, 4).rows
        for tensor in MODEL
        if (owned := own.get(tensor.name))
    )


@pytest.mark.parametrize("num_ranks", [2, 4, 16])
def test_row_blocks_are_even(num_ranks):
    total = sum(tensor.nbytes for tensor in MODEL)
    unit = math.lcm(*(tensor.row_bytes for tensor in MODEL))
    assert row_blocks(MODEL, num_ranks).slab_bytes <= total / num_ranks + 2 * unit


def test_algorithm_1_is_within_its_bound():
    generator = random.Random(0)
    for _ in range(50):
        tensors = [Tensor2D(str(i), generator.randrange(1, 500), 16) for i in range(40)]
        slab = whole_tensors(tensors, 8).slab_bytes
        mean = sum(tensor.nbytes for tensor in tensors) / 8
        # Graham: at most 4/3 of the optimum, which is at least the mean and the largest tensor.
        assert slab <= 4 / 3 * max(mean, *(tensor.nbytes for tensor in tensors))


def test_more_ranks_than_tensors():
    ownership = whole_tensors(MODEL[:3], 5)
    assert [len(own) for own in ownership.rows] == [1, 1, 1, 0, 0]
