"""Reading a run's state from a checkpoint of another layout, padding or precision."""

from __future__ import annotations

from collections.abc import Collection

from fp8lm.checkpoint import Checkpoint, Shard, load_checkpoint
from fp8lm.checkpoint.collectives import Group, all_or_error, from_all
from fp8lm.optim import AdamW
from fp8lm.runtime.errors import InputError
from fp8lm.training.conversion import Conversion, Converter, find_conversions
from fp8lm.training.resizing import RowPlan, Vocabulary, plan_rows, start_rows
from fp8lm.training.state import KINDS, StateShards, possible_names


class StateReader:
    """Fills `optimizer` and its weights from `checkpoint`; all ranks of `group` call together.

    States in the same format are read bit for bit; others are cast (see `conversion`). Tables with
    another padding or, with `extend`, fewer tokens or positions are resized (see `resizing`).
    `kinds` are the states that are read. Raises `InputError` before anything is filled if a tensor
    does not fit.
    """

    def __init__(
        self,
        optimizer: AdamW,
        checkpoint: Checkpoint,
        vocabulary: Vocabulary,
        extend: bool,
        group: Group,
        kinds: Collection[str] = ("weight", *KINDS),
    ) -> None:
        self._optimizer, self._checkpoint, self._group = optimizer, checkpoint, group
        self._stored = checkpoint.state
        specs = {name: weight.spec for name, weight in optimizer.weights.items()}
        self._rows: dict[str, RowPlan] = all_or_error(
            group, lambda: plan_rows(specs, self._stored, vocabulary, extend)
        )
        self._conversions: list[Conversion] = find_conversions(optimizer, self._stored, kinds)
        self._converter = Converter(optimizer, checkpoint, self._conversions, self._rows, group)
        all_or_error(group, self._check)
        own = {str(conversion) for conversion in self._conversions}
        self.converted = sorted(set().union(*from_all(group, own)))
        tables = {f"{name} by {len(p.new)} rows" for name, p in self._rows.items() if p.new}
        self.extended = sorted(set().union(*from_all(group, tables)))

    def read(self, shards: StateShards, unused: Collection[str]) -> None:
        """Fill the state, and whatever else `shards` names.

        Stored tensors that are `unused`, or may be states of this run, need not be among them.
        """
        load_checkpoint(
            self._checkpoint,
            self._as_stored(shards),
            self._group,
            known={*possible_names(self._optimizer), *unused},
        )
        if self.converted:
            self._converter.run()
        start_rows(self._optimizer, self._rows)

    def _check(self) -> None:
        if problems := self._converter.problems():
            raise InputError(f"a checkpoint from another model: {problems[0]}")

    def _as_stored(self, shards: StateShards) -> dict[str, list[Shard]]:
        """`shards` by name, without what is converted, tables cut to the rows that are read."""
        converted = {
            (conversion.slot.kind, conversion.slot.param) for conversion in self._conversions
        }
        found = {}
        for key, own in shards.items():
            if (key.kind, key.param) in converted:
                continue
            plan = self._rows.get(key.param)
            if plan is not None and key.field == "payload" and key in self._stored:
                own = plan.cut(own, self._stored[key])
            found[str(key)] = own
        return found
