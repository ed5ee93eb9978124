"""Which rank writes and reads which block: planners of torch.distributed.checkpoint.

Saving: every rank offers its blocks; of those that hold the same block, the one with the fewest
bytes so far writes it. Loading: every rank reads the parts of stored blocks that cover its
own blocks, so the sharding of the run that saved does not matter.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from fp8lm.checkpoint.metadata import tensor_entries
from fp8lm.checkpoint.shard import Shard
from fp8lm.runtime.errors import InputError

Shards = Mapping[str, Sequence[Shard]]
ShardKey = tuple[str, tuple[int, ...]]


class ShardSavePlanner(SavePlanner):
    """Plans the writing of `offered`, each block by one of the ranks that offer it.

    `written` are then the blocks that this rank writes, by name and offset.
    """

    def __init__(self, offered: Shards) -> None:
        self.offered = offered
        self.written: frozenset[ShardKey] = frozenset()

    def set_up_planner(
        self,
        state_dict: Shards,
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take this rank's shards."""
        self._shards = _by_key(state_dict)

    def create_local_plan(self) -> SavePlan:
        """Offer every block of this rank that is not empty."""
        shards = self._shards.items()
        return SavePlan(
            [_write_item(name, shard) for (name, _), shard in shards if not shard.is_empty]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Choose one writer per block; `ValueError` if the ranks' blocks make no whole tensor."""
        _check_agreement(item for plan in all_plans for item in plan.items)
        plans, metadata = create_default_global_save_plan(_choose_writers(all_plans))
        _check_cover(metadata)
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Write what the coordinator chose."""
        self.written = frozenset(_key(item.index) for item in new_plan.items)
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The block as it is; the storage copies it to the host."""
        tensor = self._shards[_key(write_item.index)].tensor
        if tensor.is_meta:
            raise RuntimeError(f"{write_item.index} was not copied: the ranks' shards have changed")
        return tensor.detach()


class ShardLoadPlanner(LoadPlanner):
    """Plans the filling of a dict of `Shard`s; `InputError` if the checkpoint holds other ones.

    Tensors that no rank asks for are ignored if their names begin with `ignore_prefix` or are in
    `known` of some rank.
    """

    def __init__(self, ignore_prefix: str | None = None, known: Collection[str] = ()) -> None:
        self._ignore_prefix, self._known = ignore_prefix, known

    def set_up_planner(
        self,
        state_dict: Shards,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take this rank's shards and the checkpoint's tensors."""
        self._shards = _by_key(state_dict)
        if metadata is None:
            raise ValueError("to load takes the metadata of a checkpoint")
        self._stored = tensor_entries(metadata)

    def create_local_plan(self) -> LoadPlan:
        """Find the stored parts that cover every block of this rank."""
        problems = [
            problem
            for (name, _), shard in self._shards.items()
            if (problem := _mismatch(name, shard, self._stored.get(name)))
        ]
        _raise_first(problems)
        items = [
            item
            for (name, _), shard in self._shards.items()
            for item in _read_items(name, shard, self._stored[name])
        ]
        return LoadPlan(items, planner_data=[name for name, _ in self._shards] + [*self._known])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Check that some rank asks for every stored tensor."""
        wanted = {name for plan in global_plan for name in plan.planner_data}
        prefix = self._ignore_prefix
        _raise_first(
            [
                f"{name}: expected no such tensor, found {_describe(stored)}"
                for name, stored in self._stored.items()
                if name not in wanted and (prefix is None or not name.startswith(prefix))
            ]
        )
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Read what was planned."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: object) -> None:
        """Refuse what is not a tensor."""
        raise InputError(f"the checkpoint holds an object, not a tensor: {read_item.dest_index}")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The view of this rank's block that one read fills."""
        target = self._shards[_key(read_item.dest_index)].tensor.detach()
        return select(target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: the view was filled in place."""


def _by_key(shards: Shards) -> dict[ShardKey, Shard]:
    """Every block by its tensor's name and its offset."""
    return {(name, tuple(shard.offset)): shard for name, held in shards.items() for shard in held}


def _key(index: MetadataIndex) -> ShardKey:
    return index.fqn, tuple(index.offset or ())


def select(tensor: Tensor, offsets: Iterable[int], lengths: Iterable[int]) -> Tensor:
    """The view of `lengths` elements that starts at `offsets`."""
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


def _write_item(name: str, shard: Shard) -> WriteItem:
    offset, tensor = torch.Size(shard.offset), shard.tensor
    return WriteItem(
        index=MetadataIndex(name, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offset, sizes=tensor.shape),
            properties=TensorProperties(dtype=tensor.dtype),
            size=torch.Size(shard.global_shape),
        ),
    )


def _choose_writers(plans: list[SavePlan]) -> list[SavePlan]:
    holders: dict[tuple[MetadataIndex, torch.Size], list[int]] = defaultdict(list)
    offered = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            key = (item.index, _data(item).chunk.sizes)
            holders[key].append(rank)
            offered[key] = item
    chosen: list[list[WriteItem]] = [[] for _ in plans]
    written = [0] * len(plans)
    for key, item in offered.items():
        writer = min(holders[key], key=written.__getitem__)
        chosen[writer].append(item)
        data = _data(item)
        written[writer] += math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
    return [
        dataclasses.replace(plan, items=items) for plan, items in zip(plans, chosen, strict=True)
    ]


def _data(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None:
        raise TypeError(f"{item.index.fqn} is not a tensor")
    return item.tensor_data


def _check_agreement(items: Iterable[WriteItem]) -> None:
    seen: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for item in items:
        view = (_data(item).size, _data(item).properties.dtype)
        if seen.setdefault(item.index.fqn, view) != view:
            raise ValueError(f"ranks disagree on {item.index.fqn}: {seen[item.index.fqn]}, {view}")


def _check_cover(metadata: Metadata) -> None:
    for name, stored in tensor_entries(metadata).items():
        held = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
        if held != math.prod(stored.size):
            raise ValueError(
                f"{name}: the ranks' blocks hold {held} elements of {math.prod(stored.size)}"
            )


def _mismatch(name: str, shard: Shard, stored: TensorStorageMetadata | None) -> str | None:
    expected = _describe_view(shard.tensor.dtype, shard.global_shape)
    if stored is None:
        return f"{name}: expected {expected}, found no such tensor"
    found = _describe(stored)
    return None if found == expected else f"{name}: expected {expected}, found {found}"


def _describe(stored: TensorStorageMetadata) -> str:
    return _describe_view(stored.properties.dtype, stored.size)


def _describe_view(dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _raise_first(problems: list[str]) -> None:
    if problems:
        others = f" (and {len(problems) - 1} more tensors)" if len(problems) > 1 else ""
        raise InputError(f"a checkpoint from another model: {problems[0]}{others}")


def _read_items(name: str, shard: Shard, stored: TensorStorageMetadata) -> list[ReadItem]:
    if shard.tensor.numel() == 0:
        return []
    block = ChunkStorageMetadata(torch.Size(shard.offset), shard.tensor.shape)
    items = create_read_items_for_chunk_list(name, stored, [block])
    found = sum(math.prod(item.lengths) for item in items)
    if found != shard.tensor.numel():
        raise InputError(
            f"the checkpoint is incomplete: {name} has {found} of {shard.tensor.numel()} elements"
        )
    return items
