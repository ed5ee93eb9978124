"""What a run is, byte for byte: the tensors a checkpoint holds, and how much memory they take."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fp8lm.checkpoint import Shard
from fp8lm.layers.param import Param, ParamSpec, QuantizedParam
from fp8lm.optim import AdamW


def model_tensors(weights: dict[str, Param]) -> dict[str, Tensor]:
    """Payloads, and scales where the format has one, of all model parameters, by name."""
    tensors = {}
    for name, weight in weights.items():
        tensors[f"model.{name}.payload"] = weight.model_param.payload
        if weight.model_param.format.scaled:
            tensors[f"model.{name}.scale"] = weight.model_param.scale
    return tensors


def optimizer_tensors(optimizer: AdamW) -> dict[str, Tensor]:
    """Master weights, moments, amaxes and the step count, by name."""
    return {f"optimizer.{name}": tensor for name, tensor in optimizer.named_tensors()}


def model_shards(weights: dict[str, Param]) -> dict[str, list[Shard]]:
    """What `model_tensors` names, each as this rank's part of the logical tensor.

    Payloads are views in their format's dtype, so that a checkpoint says what its bytes mean.
    """
    shards = {}
    for name, tensor in model_tensors(weights).items():
        path, _, field = name.removeprefix("model.").rpartition(".")
        if field == "payload":
            weight = weights[path]
            codes, rows = tensor.view(weight.spec.format.dtype), (0, weight.spec.local_shape[0])
            shards[name] = blocks(weight.spec, codes, rows)
        else:  # a logical tensor has one scale
            shards[name] = [Shard.whole(tensor)]
    return shards


def optimizer_shards(optimizer: AdamW) -> dict[str, list[Shard]]:
    """What `optimizer_tensors` names, as `model_shards` does it."""
    shards = {}
    for name, tensor in optimizer_tensors(optimizer).items():
        path, _, field = name.rpartition(".")
        if field == "payload":  # optimizer.KIND.PATH.payload
            _, kind, path = path.split(".", 2)
            codes = tensor.view(getattr(optimizer.states[path], kind).format.dtype)
            shards[name] = blocks(
                optimizer.weights[path].spec, codes, optimizer.sharding.local_shards[path]
            )
        else:
            shards[name] = [Shard.whole(tensor)]
    return shards


def without(shards: dict[str, list[Shard]], names: Iterable[str]) -> dict[str, list[Shard]]:
    """`shards` but those of the weights `names` and of their states."""
    marks = [f".{name}." for name in names]
    return {
        name: own for name, own in shards.items() if not any(mark in f"{name}." for mark in marks)
    }


def blocks(spec: ParamSpec, tensor: Tensor, rows: tuple[int, int]) -> list[Shard]:
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


def state_bytes(
    optimizer: AdamW, names: list[str] | None = None, padding: int = 0
) -> dict[str, int]:
    """Bytes this process holds for its weights (all, or those in `names`), by kind.

    Counted from the buffers themselves, scales included, but for `operands`: what
    `precision.cache_weight_operands` adds while a step lasts. `padding`: what the buffers of
    weights have beyond these (see `NoDataParallel.padding`).
    """
    names = list(optimizer.weights) if names is None else names
    weights = [optimizer.weights[name] for name in names]
    states = [optimizer.states[name] for name in names if name in optimizer.states]
    return {
        "weights": sum(weight.model_param.nbytes for weight in weights) + padding,
        "grads": sum(weight.main_grad.value.nbytes for weight in weights),
        "master": sum(state.master.nbytes for state in states if state.owns_master),
        "exp_avg": sum(state.exp_avg.nbytes for state in states),
        "exp_avg_sq": sum(state.exp_avg_sq.nbytes for state in states),
        "operands": sum(w.operand_bytes for w in weights if isinstance(w, QuantizedParam)),
    }


def linear_weights(weights: dict[str, Param]) -> list[str]:
    """Names of the matrices of linear layers, which the low-precision formats are for."""
    return [
        name
        for name, weight in weights.items()
        if isinstance(weight, QuantizedParam) and not weight.spec.keep_high_precision
    ]


def bytes_per_parameter(optimizer: AdamW, names: list[str], padding: int = 0) -> float:
    """Bytes of state this process holds for each parameter of the weights in `names`."""
    return sum(state_bytes(optimizer, names, padding).values()) / _count(optimizer, names)


def describe_state(optimizer: AdamW, names: list[str]) -> str:
    """One line: bytes of state per parameter of the weights in `names`, by kind."""
    count = _count(optimizer, names)
    parts = ", ".join(
        f"{kind} {size / count:.2f}" for kind, size in state_bytes(optimizer, names).items()
    )
    total = bytes_per_parameter(optimizer, names)
    return (
        f" linear layers: {count:,} parameters on this rank, {total:.2f} bytes of state each "
        f"({parts})"
    )


def _count(optimizer: AdamW, names: list[str]) -> int:
    return sum(optimizer.weights[name].spec.numel for name in names)
