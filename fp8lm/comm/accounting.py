"""Bytes that leave this rank, by wire, in the terms of ring and all-to-all algorithms.

    all-gather of n bytes per rank      (W - 1) n
    all-to-all                          the bytes for other ranks: (W - 1) n if each gets n
    all-reduce of n bytes               2 (W - 1) n / W, rounded up
    broadcast of n bytes                n on every rank but the last of the ring that starts at the
                                        source
    reduction of n bytes                n on every rank but the one that gets the sum

W is the number of ranks in the group; n includes scales and padding. A group of one sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fp8lm.config.precision import WireConfig
from fp8lm.numerics import BF16, FP32, Format

# The names under which the bytes of the keys of `precision.wire` are counted, where they differ.
_COUNTED_AS = {"gather": "tp_gather", "reduce": "tp_reduce"}
WIRES = tuple(_COUNTED_AS.get(key, key) for key in WireConfig.model_fields)
PRECISIONS = ("fp8", "bf16", "fp32")


class WireCounter:
    """Bytes sent by this rank since the last `take()`, for each wire it was made with."""

    def __init__(self, names: Iterable[str] = WIRES) -> None:
        self._sent = dict.fromkeys(names, 0)

    @property
    def sent(self) -> dict[str, int]:
        """Bytes per wire; wires that sent nothing are there with 0."""
        return dict(self._sent)

    def add(self, name: str, num_bytes: int) -> None:
        """Count bytes on the wire `name`; KeyError if there is no such wire."""
        self._sent[name] += num_bytes

    def take(self) -> dict[str, int]:
        """Return `sent` and restart from 0."""
        sent, self._sent = self._sent, dict.fromkeys(self._sent, 0)
        return sent


@dataclass(frozen=True)
class Wire:
    """One kind of communication: its name, its precision (`fp8`, `bf16` or `fp32`), its counter.

    ValueError for any other precision, KeyError for a name the counter does not have.
    """

    name: str
    precision: str
    counter: WireCounter

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"wire {self.name} carries one of {PRECISIONS}, not {self.precision}")
        self.counter.add(self.name, 0)

    @classmethod
    def of_key(cls, key: str, wires: WireConfig, counter: WireCounter) -> Wire:
        """The wire of the config key `precision.wire.KEY`."""
        return cls(_COUNTED_AS.get(key, key), wires.of(key), counter)

    def format(self, fp8: Format) -> Format:
        """The format to send in: `fp8` (E4M3 or E5M2) unless the wire carries BF16 or FP32."""
        return {"fp8": fp8, "bf16": BF16, "fp32": FP32}[self.precision]

    def count(self, num_bytes: int) -> None:
        """Count bytes that leave this rank."""
        self.counter.add(self.name, num_bytes)


def all_gather_sent(world_size: int, num_bytes: int) -> int:
    """Bytes each rank sends in an all-gather of `num_bytes` per rank."""
    return (world_size - 1) * num_bytes


def all_to_all_sent(rank: int, send_sizes: list[int]) -> int:
    """Bytes `rank` sends in an all-to-all, its own slot left out."""
    return sum(send_sizes) - send_sizes[rank]


def all_reduce_sent(world_size: int, num_bytes: int) -> int:
    """Bytes each rank sends in a ring all-reduce of `num_bytes`, rounded up."""
    return -(-2 * (world_size - 1) * num_bytes // world_size)


def broadcast_sent(world_size: int, rank: int, src: int, num_bytes: int) -> int:
    """Bytes `rank` passes on in a ring broadcast of `num_bytes` from rank `src`."""
    return num_bytes if (rank + 1) % world_size != src else 0


def reduce_sent(world_size: int, rank: int, dst: int, num_bytes: int) -> int:
    """Bytes `rank` sends in a ring reduction of `num_bytes` whose sum goes to rank `dst`."""
    return num_bytes if world_size > 1 and rank != dst else 0
