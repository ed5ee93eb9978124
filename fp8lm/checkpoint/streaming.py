"""Saving what is larger than memory: every block is made when it is about to be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from fp8lm.checkpoint.resharding import ShardSavePlanner
from fp8lm.checkpoint.shard import Shard


class StreamingSavePlanner(ShardSavePlanner):
    """Saves `offered` blocks on the meta device, of which `make_block` gives the numbers.

    Blocks on another device are saved as they are. One that has been made is freed when the next
    one is: torch's writer refers to the last block of every tensor until it has written all.
    """

    def __init__(self, offered: Mapping[str, Sequence[Shard]]) -> None:
        super().__init__(offered)
        self._made: Tensor | None = None
        self._meta = {
            (name, tuple(shard.offset)): shard
            for name, shards in offered.items()
            for shard in shards
            if shard.tensor.is_meta
        }

    def make_block(self, name: str, block: Shard) -> Tensor:
        """The numbers of a `block` of the tensor `name`, in memory that nothing else uses."""
        raise NotImplementedError

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """See `ShardSavePlanner`."""
        name, offset = write_item.index.fqn, tuple(write_item.index.offset or ())
        if (block := self._meta.get((name, offset))) is None:
            return super().resolve_data(write_item)
        if self._made is not None:
            self._made.untyped_storage().resize_(0)
        made = self.make_block(name, block)
        storage = made.untyped_storage()
        if storage.nbytes() != made.nbytes or not storage.resizable():
            made = made.clone()
        self._made = made
        return made
