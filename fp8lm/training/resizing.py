"""Embedding tables with another number of rows in a checkpoint than in this run.

padding      as many tokens, padded to another number of rows: the tensor-parallel size and
             make_vocab_size_divisible_by decide on it. Rows beyond the tokens carry nothing (no
             token looks them up, the loss leaves them out): what both have is read, the rest
             is zero
extension    more tokens or learned positions than the checkpoint has, where
             checkpoint.extend_embeddings allows it: new rows start from the initial values of
             train.seed and moments of zero. Old rows keep their bytes and the tensor its scale,
             at which a new value beyond its range saturates
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fp8lm.checkpoint import Shard, StateKey
from fp8lm.checkpoint.reader import WORD_TABLES
from fp8lm.data.tokenizer import padded_vocab_size
from fp8lm.layers.param import ParamSpec
from fp8lm.model.init import initial_value
from fp8lm.optim import AdamW
from fp8lm.runtime.errors import InputError
from fp8lm.training.state import StateSlot, slots

POSITION_TABLE = "embedding.position_embeddings.weight"
EXTEND = "set checkpoint.extend_embeddings=true to start the new rows from initial values"


@dataclass(frozen=True)
class RowPlan:
    """For one table: the first `kept` rows are read, rows `new` start anew, any others are zero."""

    kept: int
    new: range = range(0)

    def cut(self, blocks: Iterable[Shard], stored: TensorStorageMetadata) -> list[Shard]:
        """`blocks` of this run's table as blocks of the `stored` one, without what is not read."""
        return [self._cut(block, tuple(stored.size)) for block in blocks]

    def _cut(self, block: Shard, shape: tuple[int, ...]) -> Shard:
        first, *rest = block.offset
        count = self.kept_of(first, len(block.tensor))
        return Shard(block.tensor[:count], shape, (min(first, shape[0]), *rest))

    def kept_of(self, first: int, count: int) -> int:
        """Number of rows to read among `count` rows from row `first` on."""
        return min(max(self.kept - first, 0), count)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of this run and of the checkpoint (None: it does not say), and its padding."""

    num_ids: int
    former_ids: int | None
    former_multiple: int

    @classmethod
    def of(cls, num_ids: int, common: Mapping[str, Any]) -> Vocabulary:
        """From what a checkpoint's `common.json` says."""
        return cls(num_ids, former_num_ids(common), row_multiple(common["config"]))

    def plan(self, name: str, stored: int, rows: int, extend: bool) -> RowPlan | None:
        """For a table of `stored` rows in the checkpoint and `rows` here; None: they correspond.

        Raises `InputError` for one that does not fit.
        """
        former, num_ids = self.former_ids, self.num_ids
        if former is None:  # of an earlier version, or not trained here
            alike = stored == padded_vocab_size(num_ids, self.former_multiple, 1)
            former = num_ids if alike else stored
        if former == num_ids:
            return None if stored == rows else RowPlan(min(stored, rows))
        if extend and num_ids > former:
            return RowPlan(min(former, stored), range(former, num_ids))
        if stored == rows:
            return None  # whether another tokenizer may serve is not decided here
        cure = f": {EXTEND}" if num_ids > former else ", and a vocabulary cannot be cut"
        raise InputError(f"{name}: {num_ids} tokens, and the checkpoint has {former}{cure}")


def former_num_ids(common: Mapping[str, Any]) -> int | None:
    """The tokens of a checkpoint by its `common.json`; None if it does not say."""
    if tokenizer := common.get("tokenizer"):
        return tokenizer["identity"]["vocab_size"]
    section = common["config"].get("tokenizer", {})
    size, kind = section.get("vocab_size"), section.get("tokenizer_type")
    return size + 1 if kind == "NullTokenizer" and type(size) is int else None


def row_multiple(config: Mapping[str, Any]) -> int:
    """What the rows of word tables are a multiple of under `config`, as `Config.model_dump`."""
    sizes = (
        config.get("model", {}).get("make_vocab_size_divisible_by"),
        config.get("parallel", {}).get("tensor_model_parallel_size"),
    )
    return math.lcm(*(size for size in sizes if type(size) is int and size > 0))


def plan_rows(
    specs: Mapping[str, ParamSpec],
    stored: Mapping[StateKey, TensorStorageMetadata],
    vocabulary: Vocabulary,
    extend: bool,
) -> dict[str, RowPlan]:
    """The tables, by weight, that have other rows in a checkpoint of tensors `stored`.

    `extend`: new tokens and positions are allowed. Raises `InputError` where they are not, and for
    fewer than the checkpoint has.
    """
    plans = {}
    for name in (*WORD_TABLES, POSITION_TABLE):
        table = stored.get(StateKey("weight", name, "payload"))
        if name not in specs or table is None or not table.size:
            continue
        former, rows = table.size[0], specs[name].shape[0]
        if name == POSITION_TABLE:
            plan = _plan_positions(former, rows, extend)
        else:
            plan = vocabulary.plan(name, former, rows, extend)
        if plan is not None:
            plans[name] = plan
    return plans


def _plan_positions(former: int, rows: int, extend: bool) -> RowPlan | None:
    if former == rows:
        return None
    if rows > former and extend:
        return RowPlan(former, range(former, rows))
    cure = EXTEND if rows > former else f"set model.max_position_embeddings={former}"
    raise InputError(
        f"model.max_position_embeddings = {rows}, and the checkpoint has {former} learned "
        f"positions: {cure}"
    )


def start_rows(optimizer: AdamW, plans: Mapping[str, RowPlan]) -> None:
    """Set the rows that were not read, once the others and the scales are there."""
    initial = {
        name: initial_value(name, optimizer.weights[name].spec, optimizer.seed)
        for name, plan in plans.items()
        if plan.new
    }
    for slot in slots(optimizer):
        if plan := plans.get(slot.param):
            _start(slot, plan, initial.get(slot.param), optimizer)
    names = list(optimizer.weights)
    for name, values in initial.items():
        amax = optimizer.amax[names.index(name)]
        new = optimizer.kernels.amax(values[plans[name].new.start : plans[name].new.stop])
        amax[0] = torch.maximum(amax[0], new.to(amax.device))


def _start(slot: StateSlot, plan: RowPlan, initial: torch.Tensor | None, optimizer: AdamW) -> None:
    spec, tensor = slot.spec, slot.tensor
    first = spec.shard_spec.sections(spec.shape)[1][0] + slot.rows[0]
    count = len(tensor.payload)
    tensor.payload[plan.kept_of(first, count) :].zero_()
    begin, end = max(plan.new.start, first), min(plan.new.stop, first + count)
    if initial is None or begin >= end or slot.kind not in ("weight", "master"):
        return
    values = initial[begin:end].to(tensor.device)
    codes = optimizer.kernels.cast(values, tensor.scale, tensor.format)
    tensor.payload[begin - first : end - first] = codes
