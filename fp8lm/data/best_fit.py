"""Best-fit packing: examples into samples of one length, none cut.

The longest first, each into the fullest sample that has room for it, else into a new one (best-fit
decreasing, as in "Fewer Truncations Improve Language Modeling", arXiv 2404.10830).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack_best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the items in each bin; every size is from 1 to `capacity`.

    A function of the two arguments: of equal items the earlier, of equal bins the older comes
    first.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # bins by the room that is left in them, newest first
    rooms: list[int] = []  # the keys, ascending
    for item in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = int(sizes[item])
        place = bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        if left := room - size:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            insort(with_room[left], number, key=lambda each: -each)
    return bins
