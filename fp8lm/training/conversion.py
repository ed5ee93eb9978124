"""A checkpoint kept in other formats than this run's: what each tensor is made from.

    master                  the stored master weight, or the stored weight where that was its own
    weight                  the stored weight if it has this run's format and a master beside it
                            here; else the same as the master
    exp_avg, exp_avg_sq     the same moment

Tensors stored in the wanted format are read bit for bit, with their scale. Others are dequantized
to fp32 and cast to nearest, with the scale of the logical tensor's amax, taken from what is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fp8lm.checkpoint import Checkpoint, Shard, StateKey
from fp8lm.checkpoint.collectives import Group, all_or_error
from fp8lm.checkpoint.storage import read_blocks
from fp8lm.layers.shard_spec import Rows
from fp8lm.numerics import BF16, E4M3, E5M2, FP16, FP32, ROOT_E4M4, Format
from fp8lm.optim import AdamW
from fp8lm.runtime.errors import InputError
from fp8lm.scaled_tensor import ScaledTensor
from fp8lm.training.resizing import RowPlan
from fp8lm.training.state import KINDS, StateSlot, blocks, slots

Stored = Mapping[StateKey, TensorStorageMetadata]
_FORMATS = {fmt.dtype: fmt for fmt in (E4M3, E5M2, ROOT_E4M4, FP16, BF16, FP32)}


@dataclass(frozen=True)
class Conversion:
    """`slot` is made from the `source_kind` of its parameter, which is stored in `format`."""

    slot: StateSlot
    source_kind: str
    format: Format

    def __str__(self) -> str:
        kind = self.slot.kind if self.slot.kind != self.source_kind else ""
        target = f"{kind} {self.slot.tensor.format}".strip()
        return f"{self.source_kind} {self.format} -> {target}"


def find_conversions(optimizer: AdamW, stored: Stored, kinds: Collection[str]) -> list[Conversion]:
    """Which states of `kinds` cannot be read as they are from a checkpoint of tensors `stored`."""
    found = []
    for slot in slots(optimizer):
        if slot.kind not in kinds:
            continue
        kind = _source_kind(optimizer, stored, slot.param, slot.kind)
        fmt = _format_of(stored, kind, slot.param)
        if fmt is not None and (kind, fmt) != (slot.kind, slot.tensor.format):
            found.append(Conversion(slot, kind, fmt))
    return found


def _source_kind(optimizer: AdamW, stored: Stored, param: str, kind: str) -> str:
    if kind in ("exp_avg", "exp_avg_sq"):
        return kind
    compute = optimizer.weights[param].spec.format
    has_master = optimizer.precision.own_master(compute) is not None
    if kind == "weight" and has_master and _format_of(stored, "weight", param) == compute:
        return "weight"
    return "weight" if _format_of(stored, "master", param) is None else "master"


def _format_of(stored: Stored, kind: str, param: str) -> Format | None:
    """Of the `kind` of `param`, None if that is not stored."""
    tensor = stored.get(StateKey(kind, param, "payload"))
    return None if tensor is None else _FORMATS.get(tensor.properties.dtype)


class Converter:
    """Carries out `conversions` from `checkpoint`; `plans` are of tables with other rows there.

    All ranks of `group` convert together, also those that have nothing to convert.
    """

    def __init__(
        self,
        optimizer: AdamW,
        checkpoint: Checkpoint,
        conversions: list[Conversion],
        plans: Mapping[str, RowPlan],
        group: Group,
    ) -> None:
        self._optimizer, self._checkpoint = optimizer, checkpoint
        self._conversions, self._plans, self._group = conversions, plans, group
        self._stored = checkpoint.state

    def problems(self) -> list[str]:
        """What has another shape in the checkpoint."""
        return [
            f"{name}: expected shape {list(expected)}, found {list(found)}"
            for conversion in self._conversions
            for name, expected, found in [self._shapes(conversion)]
            if expected != found
        ]

    def run(self) -> None:
        """Fill all slots."""
        all_or_error(self._group, self._take_amax)
        self._optimizer.share_amax()
        all_or_error(self._group, self._cast)

    def _take_amax(self) -> None:
        """Set `AdamW.amax` of what is converted to that of the rows whose states are here."""
        names = list(self._optimizer.weights)
        for param, column in {(c.slot.param, c.slot.column) for c in self._conversions}:
            amax = self._optimizer.amax[names.index(param), column]
            amax.zero_()
            rows = self._optimizer.sharding.local_shards.get(param)
            if rows is not None and rows[0] < rows[1]:
                kind = _source_kind(self._optimizer, self._stored, param, KINDS[column])
                amax.copy_(self._optimizer.kernels.amax(self._values(kind, param, rows)))

    def _cast(self) -> None:
        names = list(self._optimizer.weights)
        for conversion in self._conversions:
            slot, kind = conversion.slot, conversion.source_kind
            tensor = slot.tensor
            if conversion.format == tensor.format:
                tensor.copy_(self._read(kind, slot.param, slot.rows))
                continue
            values = self._values(kind, slot.param, slot.rows)
            amax = self._optimizer.amax[names.index(slot.param), slot.column]
            tensor.copy_(self._optimizer.kernels.quantize(values, tensor.format, amax=amax))

    def _values(self, kind: str, param: str, rows: Rows) -> Tensor:
        return self._optimizer.kernels.dequantize(self._read(kind, param, rows))

    def _read(self, kind: str, param: str, rows: Rows) -> ScaledTensor:
        """Rows `rows` of this rank's part of `param`, as they are stored."""
        spec, payload = self._optimizer.weights[param].spec, StateKey(kind, param, "payload")
        shape = (rows[1] - rows[0], *spec.local_shape[1:])
        fmt = _format_of(self._stored, kind, param)
        if fmt is None:
            folder = self._checkpoint.folder
            raise InputError(f"{folder} holds no {payload} in a format that is known")
        tensor = ScaledTensor.zeros(shape, fmt, self._optimizer.amax.device)
        own = blocks(spec, tensor.payload.view(fmt.dtype), rows)
        if plan := self._plans.get(param):
            own = plan.cut(own, self._stored[payload])
        shards = {str(payload): own}
        if fmt.scaled:
            shards[str(StateKey(kind, param, "scale"))] = [Shard.whole(tensor.scale)]
        read_blocks(self._checkpoint.folder, self._checkpoint.metadata, shards)
        return tensor

    def _shapes(self, conversion: Conversion) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Name, and the shape that is wanted and found; the rows are planned where they differ."""
        slot = conversion.slot
        key = StateKey(conversion.source_kind, slot.param, "payload")
        expected = slot.spec.shard_spec.sections(slot.spec.shape)[0]
        found = tuple(self._stored[key].size)
        if slot.param in self._plans:
            expected, found = expected[1:], found[1:]
        return str(key), tuple(expected), found
