"""New tokens of several sequences, as one row of tokens that the model reads.

Sequences of unequal length need no padding in a GEMM: their tokens lie one after the other, and
only attention, through the cache, sees which sequence a token is of. The row is padded to a
multiple of 16 tokens, which FP8 GEMMs want; padding writes to a slot of the cache that nothing
reads.

Shapes: T tokens with padding, b sequences that have new tokens, S the most new tokens of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS_PER_TILE = 16


@dataclass(frozen=True)
class Piece:
    """Tokens `first` to `last` of what sequence `sequence` is given to read; at `position`."""

    sequence: int
    position: int
    tokens: list[int]
    first: int
    last: int

    @property
    def is_final(self) -> bool:
        """Whether the sequence has read all of it after this."""
        return self.last == len(self.tokens)


@dataclass(frozen=True)
class PackedTokens:
    """`pieces` in one row, and where the tokens of each are.

    `slots_T` are the places of keys and values in the cache, `index_bS` the token of each query of
    a sequence, `place_T` the query (row b, column S, as b * S + column) of each token.
    """

    pieces: list[Piece]
    tokens_1T: Tensor
    positions_1T: Tensor
    slots_T: Tensor
    sequences_b: Tensor
    index_bS: Tensor
    positions_bS: Tensor
    place_T: Tensor

    @property
    def ends(self) -> list[int]:
        """Index in the row of one token past the end of each piece."""
        ends = [0]
        for piece in self.pieces:
            ends.append(ends[-1] + piece.last - piece.first)
        return ends[1:]


def pack(
    pieces: list[Piece], capacity: int, unused_slot: int, device: torch.device
) -> PackedTokens:
    """`pieces`, each of another sequence, whose cache has `capacity` slots per sequence."""
    widest = max(piece.last - piece.first for piece in pieces)
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    places: list[int] = []
    index = [[0] * widest for _ in pieces]
    query_positions = [[0] * widest for _ in pieces]
    for row, piece in enumerate(pieces):
        for column, token in enumerate(piece.tokens[piece.first : piece.last]):
            position = piece.position + piece.first + column
            index[row][column], query_positions[row][column] = len(tokens), position
            tokens.append(token)
            positions.append(position)
            slots.append(piece.sequence * capacity + position)
            places.append(row * widest + column)
    padding = -len(tokens) % TOKENS_PER_TILE
    tensor = lambda values: torch.tensor(values, dtype=torch.int64, device=device)  # noqa: E731
    return PackedTokens(
        pieces,
        tensor([tokens + [0] * padding]),
        tensor([positions + [0] * padding]),
        tensor(slots + [unused_slot] * padding),
        tensor([piece.sequence for piece in pieces]),
        tensor(index),
        tensor(query_positions),
        tensor(places + [0] * padding),
    )


def divide(
    new_tokens: Sequence[list[int]], starts: Sequence[int], most_tokens: int
) -> Iterator[list[Piece]]:
    """`new_tokens` of every sequence, from position `starts` on, in groups to pack.

    A group has at most `most_tokens` tokens, counted as if all its pieces were as long as the
    longest: so many queries attention has.
    """
    done = [0] * len(new_tokens)
    while True:
        group: list[Piece] = []
        widest = 0
        for sequence, tokens in enumerate(new_tokens):
            size = min(len(tokens) - done[sequence], most_tokens)
            if not size:
                continue
            widest = max(widest, size)
            if group and widest * (len(group) + 1) > most_tokens:
                break
            first = done[sequence]
            group.append(Piece(sequence, starts[sequence], tokens, first, first + size))
        if not group:
            return
        for piece in group:
            done[piece.sequence] = piece.last
        yield group
