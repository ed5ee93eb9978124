"""Megatron-core's `torch_dist` checkpoints: the weights of one, in and out.

    decoder.layers.self_attention.linear_qkv.weight      [layers, rows, columns]
    decoder.layers.self_attention.linear_qkv.layer_norm_weight    the input norm, [layers, hidden]
    decoder.layers.mlp.linear_fc1.layer_norm_weight               that before the MLP

The rest has the names and rows that it has here, [q.. | k | v] per query group and [gate | up].
What comes in may also have layers as tensors of their own (`decoder.layers.0.`), and a prefix.
Optimizer states are in `megatron_optimizer`.
"""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner

from fp8lm.checkpoint import Checkpoint
from fp8lm.checkpoint.files import LATEST
from fp8lm.checkpoint.metadata import METADATA
from fp8lm.checkpoint.pieces import write_pieces
from fp8lm.checkpoint.reader import WORD_TABLES
from fp8lm.checkpoint.rows import StoredRows
from fp8lm.config import Config, ModelConfig
from fp8lm.convert import megatron_optimizer as optimizer
from fp8lm.convert.hf_export import DTYPES
from fp8lm.convert.megatron_names import LAYERS, key_of
from fp8lm.convert.names import param_shapes
from fp8lm.convert.output import conversion_folder
from fp8lm.convert.release import (
    Import,
    Incoming,
    LazyPlanner,
    Progressed,
    TrainingState,
    precision_of,
)
from fp8lm.convert.weights import Weights
from fp8lm.data.tokenizer import build_tokenizer, padded_vocab_size
from fp8lm.numerics import BF16, FP32, Format
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import write_whole

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def export_model(
    plan: Export,
    weights: Weights,
    output: Path,
    conversion: Mapping[str, Any],
    progress: Progressed,
) -> None:
    """Write `plan`, made of `weights`, to the folder `output`."""
    with conversion_folder(output, conversion) as work:
        iteration = weights.checkpoint.iteration
        folder = work / f"iter_{iteration:07d}"
        folder.mkdir(exist_ok=True)
        write_pieces(folder, LazyPlanner(plan.tensors, {}, progress))
        common = {
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "args": Namespace(**arguments(weights)),
            **plan.facts,
        }
        torch.save(common, folder / optimizer.COMMON)
        write_whole(folder / "metadata.json", json.dumps(BACKEND))
        write_whole(work / LATEST, f"{iteration}\n")


@dataclass(frozen=True)
class Export:
    """Megatron's tensors, what is in its `common.pt` for them, and lines that say of what."""

    tensors: dict[str, Incoming]
    facts: dict[str, Any]
    lines: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_export(weights: Weights, dtype: str, *, weights_only: bool) -> Export:
    """The master weights of a checkpoint in `dtype` (fp32, bf16), with optimizer states if it has.

    `InputError` for a model that megatron-core does not express.
    """
    if weights.model.use_parallel_residual:
        raise InputError("model.use_parallel_residual = true: megatron-core has no such layer")
    tensors = stacked(weights, DTYPES[dtype], "weight")
    lines = weights.describe(dtype)
    if weights_only or not optimizer.is_stored(weights):
        return Export(tensors, {}, lines)
    for kind, name in optimizer.NAMES_OUT.items():
        states = stacked(weights, FP32, kind)
        tensors |= {f"{optimizer.PREFIX}{name}.{key}": own for key, own in states.items()}
    lines.append("optimizer: master weights and moments in fp32")
    return Export(tensors, optimizer.facts_of(weights), lines)


def stacked(weights: Weights, fmt: Format, kind: str) -> dict[str, Incoming]:
    """Megatron's tensors of a `kind` (weight: the most exact values) in `fmt`."""
    params: dict[str, list[str]] = {}
    for param in weights.shapes:
        params.setdefault(key_of(param)[0], []).append(param)
    return {key: _stacked(weights, key, layers, fmt, kind) for key, layers in params.items()}


def _stacked(weights: Weights, key: str, layers: list[str], fmt: Format, kind: str) -> Incoming:
    """The tensor `key` made of the same parameter of all `layers`, or of the one outside them."""
    rows, *tail = weights.shapes[layers[0]]
    if layers[0] in WORD_TABLES:
        rows = weights.rows_of_table(layers[0])

    def read(start: int, stop: int) -> Tensor:
        param, first = layers[start // rows], start // rows * rows
        ranges = ((start - first, stop - first),)
        return torch.cat(list(weights.values(param, ranges, fmt.dtype, kind)))

    in_layers = key.startswith(LAYERS)
    shape = (rows * len(layers), *tail)
    return Incoming(shape, fmt, read, sections=len(layers) if in_layers else None)


def arguments(weights: Weights) -> dict[str, Any]:
    """What Megatron-LM's `--use-checkpoint-args` reads."""
    model, common = weights.model, weights.checkpoint.common
    same = (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length"),
        *("num_query_groups", "kv_channels", "max_position_embeddings", "position_embedding_type"),
        *("rotary_base", "rotary_percent", "use_rope_scaling", "rope_scaling_factor", "swiglu"),
        *("normalization", "norm_epsilon", "untie_embeddings_and_output_weights", "add_qkv_bias"),
        *("qk_layernorm", "make_vocab_size_divisible_by", "init_method_std"),
    )
    return {
        **{name: getattr(model, name) for name in same},
        "add_bias_linear": not model.disable_bias_linear,
        "group_query_attention": model.num_query_groups < model.num_attention_heads,
        "add_position_embedding": model.position_embedding_type == "learned_absolute",
        "padded_vocab_size": weights.rows_of_table(WORD_TABLES[0]),
        "iteration": weights.checkpoint.iteration,
        "consumed_train_samples": common.get("consumed_samples") or 0,
        "global_batch_size": common["config"]["train"]["global_batch_size"],
        "consumed_valid_samples": 0,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
    }


def plan_import(folder: Path, config: Config, dtype: str | None, *, weights_only: bool) -> Import:
    """The model in `folder`, which is that of `config`, with optimizer states if they are there.

    Weights are stored in `dtype` (None: their own).
    """
    tokenizer = build_tokenizer(config.tokenizer)
    place = _checkpoint_folder(folder)
    stored = _Stored.of(place)
    rows = stored.rows(WORD_TABLES[0])
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer of the config has {tokenizer.vocab_size} tokens, and the table in "
            f"{folder} {rows} rows: it is another model's"
        )
    kept = dtype or stored.dtype()
    params = stored.params(config.model, rows, FP32 if kept == "fp32" else BF16)
    model = config.model.model_dump(mode="json")
    training, line = None, "without optimizer states"
    if not weights_only:
        training, line = stored.training(config, rows)
    lines = [f"weights: {kept}", line]
    return Import(model, precision_of(kept), tokenizer, params, lines, training)


def _checkpoint_folder(folder: Path) -> Path:
    """The checkpoint that `folder` is, or whose number its latest file has."""
    if (folder / METADATA).is_file():
        return folder
    try:
        latest = (folder / LATEST).read_text().strip()[:40]
    except OSError as error:
        raise InputError(
            f"--input {folder} holds no {METADATA} and no {LATEST}: no torch_dist checkpoint"
        ) from error
    found = folder / (f"iter_{int(latest):07d}" if latest.isdecimal() else Path(latest).name)
    if not (found / METADATA).is_file():
        raise InputError(f"{found} holds no {METADATA}: only torch_dist checkpoints are read")
    return found


@dataclass(frozen=True)
class _Stored:
    """The tensors of a checkpoint by Megatron's keys; `prefix` is before each."""

    checkpoint: Checkpoint
    prefix: str

    @classmethod
    def of(cls, folder: Path) -> _Stored:
        checkpoint = Checkpoint(folder, {}, read_metadata(folder))
        table = WORD_TABLES[0]
        found = [name for name in checkpoint.tensors if name.endswith(table)]
        prefixes = [name.removesuffix(table) for name in found if "optimizer" not in name]
        if len(prefixes) != 1:
            raise InputError(f"{folder} holds no tensor {table}")
        return cls(checkpoint, prefixes[0])

    def rows(self, param: str) -> int:
        """Rows of a parameter outside of the layers."""
        return self.checkpoint.tensors[self.prefix + param].size[0]

    def dtype(self) -> str:
        """bf16 where all weights are BF16, else fp32, which holds every other dtype."""
        weights = [name for name in self.checkpoint.tensors if self._is_weight(name)]
        dtypes = {self.checkpoint.tensors[name].properties.dtype for name in weights}
        return "bf16" if dtypes == {torch.bfloat16} else "fp32"

    def _is_weight(self, name: str) -> bool:
        inner = name.removeprefix(self.prefix)
        return inner.startswith(("decoder.", "embedding.", "output_layer."))

    def params(
        self, model: ModelConfig, rows: int, fmt: Format, prefix: str = ""
    ) -> dict[str, Incoming]:
        """All parameters of `model`, whose tables have `rows`; `InputError` for another model.

        `prefix` names optimizer states of them.
        """
        found, reader = {}, StoredRows(self.checkpoint)
        used = set()
        for param, shape in param_shapes(model, rows).items():
            name, layer = self._place(param)
            used.add(name)
            name = prefix + name
            if name not in self.checkpoint.tensors:
                raise InputError(f"{self.checkpoint.folder} holds no tensor {name}")
            stacked = model.num_layers if layer is not None else 1
            wanted = (stacked * shape[0], *shape[1:])
            held = reader.shape(name, len(shape))
            if held != wanted:
                raise InputError(
                    f"{self.checkpoint.folder}: {name} has {list(held)} rows and columns, and the "
                    f"config describes {list(wanted)}"
                )
            found[param] = self._incoming(reader, name, param, shape, (layer or 0), model, fmt)
        self._refuse_others(used)
        return found

    def training(self, config: Config, rows: int) -> tuple[TrainingState | None, str]:
        """Optimizer states, if they are here, and a line that says what they are."""
        kinds = optimizer.kinds_in(self.checkpoint)
        if kinds is None:
            return None, optimizer.why_not(self.checkpoint)
        found: dict[str, dict[str, Incoming]] = {}
        for kind, name in kinds.items():
            prefix = "" if name is None else f"{optimizer.PREFIX}{name}."
            found[kind] = self.params(config.model, rows, FP32, prefix)
        line = "optimizer: master weights and moments in fp32; a run casts them to its formats"
        return optimizer.training_state(self.checkpoint, config, found), line

    def _place(self, param: str) -> tuple[str, int | None]:
        """The tensor that holds `param`, and the place in it if it is a stack of all layers."""
        key, layer = key_of(param)
        number = "" if layer is None else f"{layer}."
        own = f"{self.prefix}{LAYERS}{number}{key.removeprefix(LAYERS)}"
        for name, place in ((self.prefix + key, layer), (own, None), (self.prefix + param, None)):
            if name in self.checkpoint.tensors:
                return name, place
        raise InputError(f"{self.checkpoint.folder} holds no tensor {self.prefix}{key}")

    def _incoming(
        self,
        reader: StoredRows,
        name: str,
        param: str,
        shape: tuple[int, ...],
        layer: int,
        model: ModelConfig,
        fmt: Format,
    ) -> Incoming:
        stored = self.checkpoint.tensors[name].properties.dtype
        if stored not in _DTYPES:
            raise InputError(f"{self.checkpoint.folder}: {name} has dtype {stored}")
        first, rows = layer * shape[0], shape[0]

        def read(start: int, stop: int) -> Tensor:
            last = min(stop, rows)
            values = reader.read(name, first + start, first + last, len(shape)).to(fmt.dtype)
            padding = values.new_zeros(stop - last, *shape[1:])
            return torch.cat((values, padding)) if stop > last else values

        if param in WORD_TABLES:
            shape = (padded_vocab_size(rows, model.make_vocab_size_divisible_by, 1), *shape[1:])
        gated = model.swiglu and ".linear_fc1." in param
        return Incoming(shape, fmt, read, sections=2 if gated else None)

    def _refuse_others(self, used: set[str]) -> None:
        for name in self.checkpoint.tensors:
            if name not in used and self._is_weight(name):
                raise InputError(
                    f"{self.checkpoint.folder}: {name} has no place in the model of the config"
                )


def read_metadata(folder: Path) -> metadata.Metadata:
    """Where the tensors of a checkpoint are; refuses every class but those of such a file."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # damaged bytes can fail in any way
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(found, metadata.Metadata):
        raise InputError(f"{path} is damaged: it holds no metadata")
    return found


_CLASSES: Mapping[str, tuple[str, ...]] = {
    metadata.__name__: (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    filesystem.__name__: ("_StorageInfo", "_StoragePrefix"),
    planner.__name__: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if name == "MCoreMetadata":  # torch's with one more field
            return metadata.Metadata
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise InputError(f"refused to load {module}.{name}, which no checkpoint contains")
