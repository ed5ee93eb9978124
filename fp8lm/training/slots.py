"""Where a run keeps its state: model parameters, master weights and moments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fp8lm.optim import AdamW
from fp8lm.scaled_tensor import ScaledTensor

KINDS = ("master", "exp_avg", "exp_avg_sq")  # in the order of the columns of `AdamW.amax`
Rows = tuple[int, int]


@dataclass(frozen=True)
class StateSlot:
    """`tensor` holds rows `rows` of this rank's part of `weight`.

    `kind` is "weight" for the model parameter, else one of `KINDS`.
    """

    weight: str
    kind: str
    tensor: ScaledTensor
    rows: Rows

    @property
    def name(self) -> str:
        """What a checkpoint calls it; its payload and scale have names below this one."""
        return slot_name(self.weight, self.kind)

    @property
    def column(self) -> int:
        """The column of `AdamW.amax` that its scale follows."""
        return 0 if self.kind == "weight" else KINDS.index(self.kind)


def slot_name(weight: str, kind: str) -> str:
    """What a checkpoint calls the `kind` of `weight`."""
    return f"model.{weight}" if kind == "weight" else f"optimizer.{kind}.{weight}"


def slots(optimizer: AdamW) -> Iterator[StateSlot]:
    """All that this rank holds."""
    for name, weight in optimizer.weights.items():
        yield StateSlot(name, "weight", weight.model_param, (0, weight.spec.local_shape[0]))
    for name, state in optimizer.states.items():
        for kind, tensor in zip(KINDS, state.stored, strict=True):
            if kind != "master" or state.owns_master:
                yield StateSlot(name, kind, tensor, optimizer.sharding.local_shards[name])


def stored_names(optimizer: AdamW) -> set[str]:
    """Every name under which some version of this rank's weights and states may be stored."""
    return {
        f"{slot_name(weight, kind)}.{field}"
        for weight in optimizer.weights
        for kind in ("weight", *KINDS)
        for field in ("payload", "scale")
    }
