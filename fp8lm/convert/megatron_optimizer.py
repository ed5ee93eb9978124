"""Adam's states in megatron-core's `torch_dist` checkpoints: fp32 tensors shaped as the weights.

    optimizer.state.exp_avg.KEY, .exp_avg_sq.KEY      moments
    optimizer.state.param.KEY                         master, of the distributed optimizer
    optimizer.state.fp32_param.KEY                    master, of older ones and of the one for BF16

KEY is that of the weight (`distrib_optimizer.py`, `sharded_param_state_fully_reshardable`). The
distributed optimizer's other layouts (`dp_reshardable`) are buckets that only its own ranks
understand. Step, position and arguments are in `common.pt`, since megatron-core 0.19 in an object
of the checkpoint itself; only numbers of them are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8lm.checkpoint import Checkpoint, StateKey
from fp8lm.checkpoint.reader import StoredTensor, read_tensor
from fp8lm.config import Config
from fp8lm.convert.release import Incoming, TrainingState
from fp8lm.convert.torch_saved import facts_in, read_facts
from fp8lm.convert.weights import Weights
from fp8lm.runtime.errors import InputError
from fp8lm.training.state import KINDS

PREFIX = "optimizer.state."
NAMES_OUT = {"master": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_MASTERS = ("param", "fp32_param")
_BUCKETS = "optimizer.distributed."
COMMON, COMMON_OBJECT = "common.pt", "common_state/shard_0_1"


def kinds_in(checkpoint: Checkpoint) -> dict[str, str | None] | None:
    """Megatron's names of the states that are here, by kind; None where there are none.

    A model in fp32 has no master beside it: its name is None.
    """
    present = {
        name.removeprefix(PREFIX).partition(".")[0]
        for name in checkpoint.tensors
        if name.startswith(PREFIX)
    }
    if not {"exp_avg", "exp_avg_sq"} <= present:
        return None
    master = next((name for name in _MASTERS if name in present), None)
    return {"master": master, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def why_not(checkpoint: Checkpoint) -> str:
    """A line on why no optimizer states come in."""
    if any(name.startswith(_BUCKETS) for name in checkpoint.tensors):
        return (
            "without optimizer states: they are in buckets, which only Megatron's own ranks "
            "understand (save with --dist-ckpt-optim-fully-reshardable)"
        )
    return "without optimizer states: there are none"


def common_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What Megatron has saved beside the tensors, wherever its version puts it."""
    path = checkpoint.folder / COMMON
    if path.exists():
        return read_facts(path)
    stored = checkpoint.metadata.storage_data or {}
    places = {index.fqn: place for index, place in stored.items()}
    place = places.get(COMMON_OBJECT)
    if place is None:
        raise InputError(
            f"{checkpoint.folder} holds no {COMMON} and no object {COMMON_OBJECT}: give "
            "--weights-only"
        )
    file = checkpoint.folder / Path(place.relative_path).name
    try:
        with file.open("rb") as opened:
            opened.seek(place.offset)
            return facts_in(opened.read(place.length), f"{COMMON_OBJECT} in {file}")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


def training_state(
    checkpoint: Checkpoint, config: Config, kinds: Mapping[str, Mapping[str, Incoming]]
) -> TrainingState:
    """Where the training of `checkpoint` was, with its states `kinds`, to go on under `config`."""
    facts = common_facts(checkpoint)
    iteration = _number(facts.get("iteration"))
    if iteration is None:
        raise InputError(f"{checkpoint.folder} says no iteration: give --weights-only")
    arguments = facts.get("args")
    arguments = arguments if isinstance(arguments, dict) else {}
    batch_size = _number(arguments.get("global_batch_size")) or config.train.global_batch_size
    consumed = _number(arguments.get("consumed_train_samples"))
    sections = config.model_dump(mode="json")
    return TrainingState(
        iteration,
        consumed or iteration * batch_size,
        batch_size,
        _steps(facts.get("optimizer")) or iteration,
        kinds,
        {name: sections[name] for name in ("train", "optimizer", "scheduler", "data")},
    )


def _number(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None


def _steps(optimizer: Any) -> int | None:
    """Adam's steps, wherever an optimizer's state dict has them."""
    while isinstance(optimizer, dict):
        groups = optimizer.get("param_groups")
        first = groups[0] if isinstance(groups, list) and groups else None
        step = first.get("step") if isinstance(first, dict) else None
        state = optimizer.get("state")
        step = state.get("common_step", step) if isinstance(state, dict) else step
        if step is not None:
            return int(step)
        optimizer = optimizer.get("optimizer", optimizer.get(0))
    return None


def is_stored(weights: Weights) -> bool:
    """Whether a checkpoint of this program has optimizer states of all its weights."""
    state = weights.checkpoint.state
    return all(
        StateKey(kind, param, "payload") in state
        for param in weights.shapes
        for kind in KINDS[1:]  # a weight may be its own master
    )


def facts_of(weights: Weights) -> dict[str, Any]:
    """What Megatron's optimizer and schedule read in `common.pt`."""
    common = weights.checkpoint.common
    adam, steps = common["config"]["optimizer"], _steps_of(weights)
    group = {
        "lr": adam["lr"],
        "max_lr": adam["lr"],
        "min_lr": adam["min_lr"],
        "betas": (adam["adam_beta1"], adam["adam_beta2"]),
        "eps": adam["adam_eps"],
        "weight_decay": adam["weight_decay"],
        "step": steps,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "default_config": True,
    }
    groups = [{**group, "wd_mult": factor} for factor in (1.0, 0.0)]  # matrices, vectors
    return {
        "optimizer": {
            "optimizer": {"param_groups": groups},
            "param_state_sharding_type": "fully_reshardable",
        }
    }


def _steps_of(weights: Weights) -> int:
    key = StateKey("num_steps")
    stored = weights.checkpoint.state[key]
    tensor = StoredTensor(str(key), stored.properties.dtype, ())
    return int(read_tensor(weights.checkpoint, tensor))
