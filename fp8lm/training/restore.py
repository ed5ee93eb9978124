"""Loads a trained model from a checkpoint, without optimizer or data, under any layout.

The layout is that of the process groups, whatever the one it was trained under. Wires carry the
dtype of activations, so that no value depends on which others travel with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8lm.checkpoint import Checkpoint, Shard, StateKey, load_checkpoint, open_checkpoint
from fp8lm.checkpoint.collectives import all_or_error
from fp8lm.checkpoint.loading import check_fits
from fp8lm.checkpoint.reader import WORD_TABLES, stored_tensors
from fp8lm.comm import WireCounter
from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import ProcessGroups
from fp8lm.config import Config, ModelConfig, TokenizerConfig, build_config
from fp8lm.data.identity import differences
from fp8lm.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from fp8lm.kernels import Kernels, ReferenceKernels, select_kernels
from fp8lm.kernels.select import check_scaling
from fp8lm.layers.param import freeze, named_params
from fp8lm.layers.recipe import Recipe
from fp8lm.model import GPTModel
from fp8lm.parallel.parallelize import build_tp_context, stage_specs
from fp8lm.runtime.errors import InputError
from fp8lm.training.provenance import tokenizer_of
from fp8lm.training.resizing import RowPlan
from fp8lm.training.state import by_name, model_shards

FP32_BYTES = 4
LARGEST_TABLES = 2**28  # bytes of rotary tables that any model may have, however few its weights


@dataclass(frozen=True)
class Restored:
    """This rank's part of a model, frozen, its tokenizer and the config it ran with.

    `config` has the layout of this job in its section `parallel`. `warnings` name differences from
    training.
    """

    model: GPTModel
    kernels: Kernels
    tokenizer: Tokenizer
    config: Config
    warnings: list[str]


def restore_model(
    folder: str,
    groups: ProcessGroups,
    device: torch.device,
    tokenizer_model: str | None = None,
    tokenizer_type: str | None = None,
) -> Restored:
    """The model of a checkpoint, or of the newest valid one in a folder; a collective of all ranks.

    Weights keep the format they were trained in. The tokenizer is the one whose files are in the
    checkpoint, else the one that its config names, unless `tokenizer_model` names another. Raises
    `InputError` for what cannot be loaded.
    """
    checkpoint = open_checkpoint(folder, group=groups.world, needed=("config",))
    config = all_or_error(groups.world, lambda: _config(checkpoint, groups.dims))
    tokenizer = all_or_error(
        groups.world,
        lambda: _tokenizer(checkpoint, config.tokenizer, tokenizer_model, tokenizer_type),
    )
    return _restore(checkpoint, config, groups, device, tokenizer)


def _config(checkpoint: Checkpoint, dims: ParallelDims) -> Config:
    """The stored config, with the layout of this job."""
    content = dict(checkpoint.common["config"])
    content["parallel"] = {
        "tensor_model_parallel_size": dims.tp,
        "pipeline_model_parallel_size": dims.pp,
    }
    precision = content.get("precision")
    stored = precision.get("wire") if isinstance(precision, dict) else None
    if isinstance(precision, dict) and isinstance(stored, dict):  # else validation says what it is
        content["precision"] = {**precision, "wire": {**stored, **wires_in_bf16()}}
    return build_config(content)


def wires_in_bf16() -> dict[str, str]:
    """Keys of `precision.wire` under which no value depends on which others travel with it."""
    return dict.fromkeys(("gather", "reduce", "pipeline"), "bf16")


def _restore(
    checkpoint: Checkpoint,
    config: Config,
    groups: ProcessGroups,
    device: torch.device,
    tokenizer: Tokenizer,
) -> Restored:
    stored = _vocabulary_rows(checkpoint)
    if tokenizer.vocab_size > stored:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and the model of "
            f"{checkpoint.folder} has rows for {stored}: it is another one's"
        )
    _check_is_stored(checkpoint, config, stored)
    check_scaling(device, config, trains=False)
    kernels = select_kernels(device)
    tp = build_tp_context(config, groups, kernels, WireCounter())
    recipe = Recipe.from_config(config.precision, kernels, device, tp).for_inference()
    rows = -(-stored // tp.size) * tp.size
    (part,) = stage_specs(config, groups.pipeline_parallel.rank())
    model = GPTModel(config.model, rows, recipe, part=part)
    freeze(model)
    shards = model_shards(named_params(model))
    if rows != stored:
        shards = {key: _without_padding(key, own, checkpoint) for key, own in shards.items()}
    load_checkpoint(checkpoint, by_name(shards), groups.world, ignore_prefix="")
    return Restored(model.eval(), kernels, tokenizer, config, _warnings(checkpoint, tokenizer))


def _without_padding(key: StateKey, blocks: list[Shard], checkpoint: Checkpoint) -> list[Shard]:
    """`blocks` of a word table, which this layout pads beyond the stored rows; others as they are.

    The rest stays zero, which no token looks up.
    """
    if key.param not in WORD_TABLES or key.field != "payload":
        return blocks
    stored = checkpoint.state[key]
    return RowPlan(stored.size[0]).cut(blocks, stored)


def _tokenizer(
    checkpoint: Checkpoint,
    config: TokenizerConfig,
    tokenizer_model: str | None,
    tokenizer_type: str | None,
) -> Tokenizer:
    if tokenizer_model is not None:
        return load_tokenizer(tokenizer_type or config.tokenizer_type, tokenizer_model)
    if (own := tokenizer_of(checkpoint)) is not None:
        return own
    try:
        return build_tokenizer(config)
    except InputError as error:
        raise InputError(
            f"{error}; {checkpoint.folder} holds no tokenizer itself: name one with "
            "--tokenizer-model"
        ) from error


def _vocabulary_rows(checkpoint: Checkpoint) -> int:
    """Rows of the word tables as they are stored, whatever layout padded them."""
    stored = checkpoint.state.get(StateKey("weight", WORD_TABLES[0], "payload"))
    if stored is None or len(stored.size) != 2:
        raise InputError(f"{checkpoint.folder} holds no table {WORD_TABLES[0]}")
    return stored.size[0]


def _check_is_stored(checkpoint: Checkpoint, config: Config, rows: int) -> None:
    """Raise `InputError` for another model than is stored, before memory is taken for it."""
    layers, stored = config.model.num_layers, checkpoint.tensors
    if layers > len(stored):
        raise InputError(f"{checkpoint.folder} holds {len(stored)} tensors, not {layers} layers")
    _check_positions(checkpoint, config.model)
    recipe = Recipe.from_config(config.precision, ReferenceKernels(), torch.device("meta"))
    model = GPTModel(config.model, rows, recipe)
    wanted = model_shards(named_params(model))
    check_fits(checkpoint, by_name(wanted))
    # A model of fewer layers than are stored would load, too.
    weights = (key for key in checkpoint.state if key.kind == "weight")
    unused = sorted(str(key) for key in weights if key not in wanted)
    if unused:
        raise InputError(
            f"{checkpoint.folder} is a checkpoint from another model than its config says: "
            f"{unused[0]} has no place in it (and {len(unused) - 1} more)"
        )


def _check_positions(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Raise `InputError` for rotary tables beyond the size of the weights: they are not stored."""
    if model.position_embedding_type != "rope":
        return
    tables = 2 * FP32_BYTES * model.max_position_embeddings * model.kv_channels
    weights = sum(tensor.nbytes for tensor in stored_tensors(checkpoint, "model.*").values())
    if tables > max(weights, LARGEST_TABLES):
        raise InputError(
            f"the config in {checkpoint.folder} has model.max_position_embeddings = "
            f"{model.max_position_embeddings}, whose rotary tables would take {tables:,} bytes, "
            f"and the weights have {weights:,}: it is damaged"
        )


def _warnings(checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[str]:
    recorded = (checkpoint.common.get("tokenizer") or {}).get("identity", {})
    changed = differences(recorded, tokenizer.identity)
    found = [f"passed over a checkpoint: {problem}" for problem in checkpoint.passed_over]
    if changed:
        found.append(f"not the tokenizer of the training: {', '.join(changed)} differs")
    return found
