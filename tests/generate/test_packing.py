"""Tokens of sequences in one row: each once, at its place, in groups that fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8lm.generate.packing import TOKENS_PER_TILE, divide, pack

CAPACITY = 100


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 40))
def test_every_token_is_read_once_in_its_order(lengths, most):
    new = [[100 * i + j for j in range(length)] for i, length in enumerate(lengths)]
    starts = [10 * i for i in range(len(lengths))]
    unused = CAPACITY * len(lengths)
    read = [[] for _ in lengths]
    for group in divide(new, starts, most):
        packed = pack(group, CAPACITY, unused, torch.device("cpu"))
        tokens, slots = packed.tokens_1T[0].tolist(), packed.slots_T.tolist()
        assert len(tokens) % TOKENS_PER_TILE == 0
        sizes = [piece.last - piece.first for piece in group]
        assert max(sizes) * len(sizes) <= max(most, 1)
        count = sum(sizes)
        assert set(slots[count:]) <= {unused}
        for row, piece in enumerate(group):
            indices = packed.index_bS[row, : sizes[row]]
            read[piece.sequence] += packed.tokens_1T[0, indices].tolist()
            positions = packed.positions_1T[0, indices]
            assert positions.tolist() == packed.positions_bS[row, : sizes[row]].tolist()
            expected = CAPACITY * piece.sequence + positions
            assert packed.slots_T[indices].tolist() == expected.tolist()
            queries = packed.place_T[indices] - row * packed.index_bS.shape[1]
            assert queries.tolist() == list(range(sizes[row]))
            assert piece.is_final == (len(read[piece.sequence]) == len(new[piece.sequence]))
            assert packed.ends[row] == indices[-1] + 1
    assert read == new


@pytest.mark.parametrize("most", [1, 7, 100])
def test_positions_follow_the_start(most):
    found = []
    for group in divide([[1, 2, 3]], [40], most):
        packed = pack(group, CAPACITY, CAPACITY, torch.device("cpu"))
        found += packed.positions_1T[0, : group[0].last - group[0].first].tolist()
    assert found == [40, 41, 42]
