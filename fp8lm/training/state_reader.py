"""Reading a run's state from a checkpoint of another layout, padding or precision."""

from __future__ import annotations

from collections.abc import Mapping

from fp8lm.checkpoint import Checkpoint, Shard, load_checkpoint
from fp8lm.checkpoint.collectives import Group, all_or_error, from_all
from fp8lm.optim import AdamW
from fp8lm.runtime.errors import InputError
from fp8lm.training.conversion import Conversion, Converter, find_conversions
from fp8lm.training.resizing import RowPlan, Vocabulary, plan_rows, start_rows
from fp8lm.training.slots import stored_names


class StateReader:
    """Fills `optimizer` and its weights from `checkpoint`; all ranks of `group` call together.

    What is stored as it is held here is read as it is; other formats are cast (see `conversion`),
    and other paddings and, with `extend`, more tokens or positions are fitted (see `resizing`).
    Raises `InputError` before anything is filled if a tensor does not fit.
    """

    def __init__(
        self,
        optimizer: AdamW,
        checkpoint: Checkpoint,
        vocabulary: Vocabulary,
        extend: bool,
        group: Group,
    ) -> None:
        self._optimizer, self._checkpoint, self._group = optimizer, checkpoint, group
        self._stored = checkpoint.tensors
        specs = {name: weight.spec for name, weight in optimizer.weights.items()}
        self._rows: dict[str, RowPlan] = all_or_error(
            group, lambda: plan_rows(specs, self._stored, vocabulary, extend)
        )
        self._conversions: list[Conversion] = find_conversions(optimizer, self._stored)
        self._converter = Converter(optimizer, checkpoint, self._conversions, self._rows, group)
        all_or_error(group, self._check)
        own = {str(conversion) for conversion in self._conversions}
        self.converted = sorted(set().union(*from_all(group, own)))
        tables = {f"{name} by {len(p.new)} rows" for name, p in self._rows.items() if p.new}
        self.extended = sorted(set().union(*from_all(group, tables)))

    def read(self, shards: Mapping[str, list[Shard]], ignore_prefix: str) -> None:
        """Fill the state, and whatever else `shards` names, which are all that a run keeps.

        Stored tensors whose names begin with `ignore_prefix` need not be among them.
        """
        load_checkpoint(
            self._checkpoint,
            self._as_stored(shards),
            self._group,
            ignore_prefix=ignore_prefix,
            known=stored_names(self._optimizer),
        )
        if self.converted:
            self._converter.run()
        start_rows(self._optimizer, self._rows)

    def _check(self) -> None:
        if problems := self._converter.problems():
            raise InputError(f"a checkpoint from another model: {problems[0]}")

    def _as_stored(self, shards: Mapping[str, list[Shard]]) -> dict[str, list[Shard]]:
        """`shards` without what is converted, and tables cut to the rows that are read."""
        converted = {conversion.slot.name for conversion in self._conversions}
        found = {}
        for name, own in shards.items():
            slot, _, field = name.rpartition(".")
            if field in ("payload", "scale") and slot in converted:
                continue
            plan = self._rows.get(slot.removeprefix("model.")) or self._rows.get(_weight_of(slot))
            if field == "payload" and plan is not None and name in self._stored:
                own = plan.cut(own, self._stored[name])
            found[name] = own
        return found


def _weight_of(slot: str) -> str:
    """The weight's name in `optimizer.KIND.WEIGHT`."""
    return slot.split(".", 2)[-1]
