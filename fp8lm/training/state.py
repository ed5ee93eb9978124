"""The state of a run: the tensors of a checkpoint, and this rank's blocks of them.

Keys are those of `StateKey`. A `StateSlot` is a scaled tensor of one parameter: the weight itself,
or a state of the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fp8lm.checkpoint import Checkpoint, Shard
from fp8lm.checkpoint.state_key import FIELDS, StateKey
from fp8lm.layers.amax_history import AmaxHistories
from fp8lm.layers.param import Param, ParamSpec
from fp8lm.layers.shard_spec import Rows
from fp8lm.optim import AdamW
from fp8lm.scaled_tensor import ScaledTensor

KINDS = ("master", "exp_avg", "exp_avg_sq")  # in the order of the columns of `AdamW.amax`
StateShards = dict[StateKey, list[Shard]]


@dataclass(frozen=True)
class StateSlot:
    """`tensor` holds rows `rows` of this rank's part of `param`, whose spec is `spec`.

    `kind` is "weight" for the model parameter, else one of `KINDS`.
    """

    kind: str
    param: str
    tensor: ScaledTensor
    spec: ParamSpec
    rows: Rows

    @property
    def column(self) -> int:
        """The column of `AdamW.amax` that its scale follows."""
        return 0 if self.kind == "weight" else KINDS.index(self.kind)

    def key(self, field: str) -> StateKey:
        """Of its payload or scale."""
        return StateKey(self.kind, self.param, field)

    def tensors(self) -> dict[StateKey, Tensor]:
        """Payload and scale as they are held; a weight has a scale where its format has one."""
        found = {self.key("payload"): self.tensor.payload}
        if self.kind != "weight" or self.tensor.format.scaled:
            found[self.key("scale")] = self.tensor.scale
        return found

    def shards(self) -> StateShards:
        """This rank's blocks of the logical tensors, of which each has one scale.

        The payload is a view in its format's dtype, so that a checkpoint says what its bytes mean.
        """
        found = {key: [Shard.whole(tensor)] for key, tensor in self.tensors().items()}
        codes = self.tensor.payload.view(self.tensor.format.dtype)
        found[self.key("payload")] = blocks(self.spec, codes, self.rows)
        return found


def weight_slots(weights: dict[str, Param]) -> Iterator[StateSlot]:
    """The model parameters."""
    for name, weight in weights.items():
        rows = (0, weight.spec.local_shape[0])
        yield StateSlot("weight", name, weight.model_param, weight.spec, rows)


def optimizer_slots(optimizer: AdamW) -> Iterator[StateSlot]:
    """The states that this rank holds, without a master that is the model parameter."""
    for name, state in optimizer.states.items():
        spec, rows = optimizer.weights[name].spec, optimizer.sharding.local_shards[name]
        for kind, tensor in zip(KINDS, state.stored, strict=True):
            if kind != "master" or state.owns_master:
                yield StateSlot(kind, name, tensor, spec, rows)


def slots(optimizer: AdamW) -> Iterator[StateSlot]:
    """All slots that this rank holds."""
    yield from weight_slots(optimizer.weights)
    yield from optimizer_slots(optimizer)


def model_tensors(weights: dict[str, Param]) -> dict[StateKey, Tensor]:
    """All model parameters, as they are held."""
    return {key: own for slot in weight_slots(weights) for key, own in slot.tensors().items()}


def model_shards(weights: dict[str, Param]) -> StateShards:
    """This rank's blocks of all model parameters."""
    return {key: own for slot in weight_slots(weights) for key, own in slot.shards().items()}


def optimizer_tensors(optimizer: AdamW) -> dict[StateKey, Tensor]:
    """Master weights, moments, amaxes and the step count, as they are held."""
    states = (slot.tensors() for slot in optimizer_slots(optimizer))
    return _counters(optimizer) | {key: own for state in states for key, own in state.items()}


def optimizer_shards(optimizer: AdamW) -> StateShards:
    """What `optimizer_tensors` holds, as this rank's blocks."""
    whole = {key: [Shard.whole(tensor)] for key, tensor in _counters(optimizer).items()}
    states = (slot.shards() for slot in optimizer_slots(optimizer))
    return whole | {key: own for state in states for key, own in state.items()}


def _counters(optimizer: AdamW) -> dict[StateKey, Tensor]:
    amaxes = zip(optimizer.weights, optimizer.amax.unbind(), strict=True)
    return {StateKey("num_steps"): optimizer.num_steps} | {
        StateKey("amax", name): amax for name, amax in amaxes
    }


def history_shards(histories: AmaxHistories) -> StateShards:
    """The histories of delayed scaling, which all ranks that have a layer hold alike."""
    return {
        StateKey("amax_history", layer, kind): [Shard.whole(history)]
        for (layer, kind), history in histories.by_key.items()
    }


def stored_histories(histories: AmaxHistories, checkpoint: Checkpoint) -> StateShards:
    """Those that `checkpoint` has in this length; others start anew."""
    length = (histories.length,)
    return {
        key: own
        for key, own in history_shards(histories).items()
        if (stored := checkpoint.state.get(key)) is not None and tuple(stored.size) == length
    }


def by_name(shards: StateShards) -> dict[str, list[Shard]]:
    """`shards` as a checkpoint names them."""
    return {str(key): own for key, own in shards.items()}


def possible_names(optimizer: AdamW) -> set[str]:
    """Every name under which some version of this rank's weights and states may be stored."""
    return {
        str(StateKey(kind, name, field))
        for name in optimizer.weights
        for kind in ("weight", *KINDS)
        for field in FIELDS
    }


def blocks(spec: ParamSpec, tensor: Tensor, rows: Rows) -> list[Shard]:
    """`tensor`, rows `rows` of this rank's part of the weight `spec`, as rectangular blocks.

    Of a gated matrix the rows of each section are blocks of their own.
    """
    split, (first, last) = spec.shard_spec, rows
    shape, offset = split.sections(spec.shape)
    if split.num_sections == 1:
        return [Shard(tensor, shape, (offset[0] + first, *offset[1:]))]
    per_section = spec.local_shape[0] // split.num_sections
    found = []
    for section in range(split.num_sections):
        start = max(first, section * per_section)
        stop = min(last, (section + 1) * per_section)
        if start < stop:
            row = offset[1] + start - section * per_section
            block = tensor[start - first : stop - first][None]
            found.append(Shard(block, shape, (section, row, *offset[2:])))
    return found
