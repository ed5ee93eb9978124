"""Who owns what: Algorithm 1, row blocks, and that every row has one owner."""

from __future__ import annotations

import bisect
import itertools
import math
import random

import pytest

from fp8lm.parallel.param_layout import BufferEntry, assign_whole_tensors, shard_rows

LAYER = [("qkv", 192, 64, 1), ("proj", 64, 64, 1), ("fc1", 256, 64, 1), ("fc2", 64, 256, 1)]
MODEL = [BufferEntry("table", 512, 64, 2)] + [
    BufferEntry(f"{layer}.{name}", *sizes)
    for layer in range(6)
    for name, *sizes in [*LAYER, ("norm", 64, 1, 2)]
]


def owners(layout, name, rows):
    """The owner of every row."""
    found = [None] * rows
    for rank, own in enumerate(layout.rows):
        start, stop = own.get(name, (0, 0))
        for row in range(start, stop):
            assert found[row] is None
            found[row] = rank
    return found


@pytest.mark.parametrize("place", [assign_whole_tensors, shard_rows])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8, 64])
def test_every_row_has_one_owner_and_lies_in_its_shard(place, num_ranks):
    [layout] = place([MODEL], num_ranks)
    first_of = [0, *itertools.accumulate(layout.shard_bytes)]
    shard_of = lambda byte: bisect.bisect_right(first_of, byte) - 1  # noqa: E731
    taken = []
    for tensor in MODEL:
        start = layout.start[tensor.name]
        assert start % 16 == 0
        taken.append((start, start + tensor.nbytes))
        for row, owner in enumerate(owners(layout, tensor.name, tensor.rows)):
            first = start + row * tensor.row_bytes
            last = first + tensor.row_bytes - 1
            assert shard_of(first) == shard_of(last) == owner
    taken.sort()
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(taken))
    assert taken[-1][1] <= sum(layout.shard_bytes)


def test_algorithm_1_by_hand():
    sizes = {"a": 70, "b": 60, "c": 30, "d": 30, "e": 20, "f": 10}
    tensors = [BufferEntry(name, size, 16, 1) for name, size in sizes.items()]
    rows = assign_whole_tensors([tensors], 3)[0].rows
    # a | b | c, then d to c's rank (60), e to b's (60 each: the first of the least), f to c's.
    assert [set(own) for own in rows] == [{"a"}, {"b", "e"}, {"c", "d", "f"}]


def test_whole_tensors_stay_whole():
    assert all(
        owned == (0, tensor.rows)
        for own in assign_whole_tensors([MODEL], 4)[0].rows
        for tensor in MODEL
        if (owned := own.get(tensor.name))
    )


@pytest.mark.parametrize("num_ranks", [2, 4, 16])
def test_row_blocks_are_even(num_ranks):
    total = sum(tensor.nbytes for tensor in MODEL)
    unit = math.lcm(*(tensor.row_bytes for tensor in MODEL))
    [layout] = shard_rows([MODEL], num_ranks)
    assert len(set(layout.shard_bytes)) == 1
    assert layout.shard_bytes[0] <= total / num_ranks + 2 * unit


def test_algorithm_1_is_within_its_bound():
    generator = random.Random(0)
    for _ in range(50):
        tensors = [BufferEntry(str(i), generator.randrange(1, 500), 16, 1) for i in range(40)]
        most = max(assign_whole_tensors([tensors], 8)[0].shard_bytes)
        mean = sum(tensor.nbytes for tensor in tensors) / 8
        # Graham: at most 4/3 of the optimum, which is at least the mean and the largest tensor.
        assert most <= 4 / 3 * max(mean, *(tensor.nbytes for tensor in tensors))


def test_algorithm_1_balances_elements_as_states_do():
    """Who owns the one that is stored in two bytes gets no fewer others for it."""
    tensors = [BufferEntry("table", 64, 16, 2)] + [BufferEntry(str(i), 64, 16, 1) for i in range(4)]
    rows = assign_whole_tensors([tensors], 2)[0].rows
    assert [set(own) for own in rows] == [{"table", "1", "3"}, {"0", "2"}]


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_parts_have_the_owners_of_the_whole(num_ranks):
    """Dealt out part by part, the first ranks would own nearly all of them."""
    parts = [MODEL[i : i + 3] for i in range(0, len(MODEL), 3)]
    [whole] = assign_whole_tensors([MODEL], num_ranks)
    found = assign_whole_tensors(parts, num_ranks)
    for rank in range(num_ranks):
        assert whole.rows[rank] == {n: r for part in found for n, r in part.rows[rank].items()}
    assert sum(sum(part.shard_bytes) for part in found) == sum(whole.shard_bytes)


@pytest.mark.parametrize("num_ranks", [1, 8, 64])
def test_buffers_of_whole_tensors_have_no_padding_but_to_16_bytes(num_ranks):
    nbytes = sum(tensor.nbytes for tensor in MODEL)
    assert sum(assign_whole_tensors([MODEL], num_ranks)[0].shard_bytes) <= nbytes + 15 * len(MODEL)


def test_more_ranks_than_tensors():
    [layout] = assign_whole_tensors([MODEL[:3]], 5)
    assert [len(own) for own in layout.rows] == [1, 1, 1, 0, 0]
