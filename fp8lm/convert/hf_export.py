"""A checkpoint written as a HuggingFace model.

fp32, bf16    the master weights, rounded where they have more bits
fp8           matrices of FP8 layers as codes and scales (see `compressed_tensors`), the rest
              in BF16: all as trained
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8lm.checkpoint import Checkpoint, StateKey
from fp8lm.checkpoint.reader import StoredTensor, read_tensor
from fp8lm.convert import compressed_tensors
from fp8lm.convert.architectures import architecture_of, to_hugging_face
from fp8lm.convert.names import (
    NamedRows,
    head_of,
    hugging_face_names,
)
from fp8lm.convert.output import conversion_folder
from fp8lm.convert.release import Progressed
from fp8lm.convert.safetensors_files import (
    OutputTensor,
    plan_files,
    write_file,
    write_index,
)
from fp8lm.convert.tokenizers import reservations, token_ids, tokenizer_files
from fp8lm.convert.weights import Weights
from fp8lm.data.tokenizer import NullTokenizer, Tokenizer
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.amax_history import scales_of_histories
from fp8lm.layers.unit_scale import UnitScale
from fp8lm.numerics import BF16, E4M3, FP32, granularity_by_name, scale_from_amax
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import write_whole
from fp8lm.training.provenance import tokenizer_of

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
DTYPES = {"fp32": FP32, "bf16": BF16}
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Export:
    """The files of a HuggingFace model: config.json, its tensors, and lines that say of what."""

    config: dict[str, Any]
    tensors: list[OutputTensor]
    tokenizer: Tokenizer
    lines: list[str]


def plan_export(checkpoint: Checkpoint, dtype: str | None) -> Export:
    """The model of `checkpoint` in `dtype`: fp32, bf16, or None for FP8 as it was trained.

    `InputError` for a model that no architecture there expresses.
    """
    weights, tokenizer = Weights.of(checkpoint), _tokenizer(checkpoint)
    kind = architecture_of(weights.model)
    config = to_hugging_face(weights.model, weights.vocab_size)
    ids = token_ids(tokenizer)
    if dtype is None:
        named, ignore = _fp8_tensors(weights, kind)
        config["quantization_config"] = compressed_tensors.quantization_config(ignore)
        lines = ["weights: FP8 codes and scales as trained, the rest in BF16"]
    else:
        named, target = [], DTYPES[dtype].dtype
        for rows in hugging_face_names(weights.model, kind, weights.shapes):
            named.append(_tensor(weights, rows, target))
        lines = weights.describe(dtype)
    config |= {"torch_dtype": _TORCH_NAMES[dtype or "bf16"], **ids}
    lines = [f"architecture: {kind}", *lines, *reservations(tokenizer)]
    return Export(config, named, tokenizer, lines)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if (found := tokenizer_of(checkpoint)) is not None:
        return found
    recorded = checkpoint.common.get("tokenizer")
    if recorded is None or recorded["identity"]["tokenizer_type"] != "NullTokenizer":
        raise InputError(f"{checkpoint.folder} holds no tokenizer")
    return NullTokenizer(recorded["identity"]["vocab_size"] - 1)


def _tensor(weights: Weights, rows: NamedRows, dtype: torch.dtype) -> OutputTensor:
    def blocks() -> Iterator[Tensor]:
        found = weights.values(rows.param, rows.ranges, dtype)
        return iter([torch.cat(list(found)).t()]) if rows.transposed else found

    shape = (rows.num_rows, *weights.shapes[rows.param][1:])
    return OutputTensor(rows.name, dtype, shape[::-1] if rows.transposed else shape, blocks)


def _fp8_tensors(weights: Weights, kind: str) -> tuple[list[OutputTensor], list[str]]:
    """All tensors with FP8 matrices, and the linear layers that have none."""
    if kind == "gpt2":
        raise InputError(
            "compressed-tensors quantizes Linear modules, and transformers' gpt2 has Conv1D ones: "
            "export this model with --to hf"
        )
    # GPT-NeoX's head is embed_out in files and in vLLM, and lm_head in transformers.
    found, ignore = [], sorted({head_of(kind), "lm_head"})
    scales = cache(lambda param: _fp8_scale(weights, param))
    for rows in hugging_face_names(weights.model, kind, weights.shapes):
        is_matrix = ".linear_" in rows.param and rows.param.endswith(".weight")
        if not is_matrix or _in_bf16(weights, rows.param):
            found.append(_trained(weights, rows))
            if is_matrix:
                ignore.append(rows.name.removesuffix(".weight"))
            continue
        found.extend(_codes_and_scale(weights, rows, scales))
    return found, ignore


def _in_bf16(weights: Weights, param: str) -> bool:
    """Whether the GEMMs of a matrix are in BF16; `InputError` for a model without FP8 GEMMs."""
    if weights.precision.gemm != "fp8":
        raise InputError(
            f"the model of {weights.checkpoint.folder} was trained with precision.gemm = "
            f"{weights.precision.gemm}, without FP8: export it with --to hf"
        )
    layer = int(param.removeprefix("decoder.layers.").partition(".")[0])
    outer = layer in (0, weights.model.num_layers - 1)
    return weights.precision.first_last_layers_bf16 and outer


def _trained(weights: Weights, rows: NamedRows) -> OutputTensor:
    """The model parameter as forward reads it, in BF16."""

    def blocks() -> Iterator[Tensor]:
        for start, stop in weights.blocks(rows.param, rows.ranges):
            yield ReferenceKernels().dequantize(
                weights.read(rows.param, start, stop), torch.bfloat16
            )

    shape = (rows.num_rows, *weights.shapes[rows.param][1:])
    return OutputTensor(rows.name, torch.bfloat16, shape, blocks)


def _codes_and_scale(
    weights: Weights, rows: NamedRows, scale_of: Callable[[str], Tensor]
) -> list[OutputTensor]:
    def blocks() -> Iterator[Tensor]:
        for start, stop in weights.blocks(rows.param, rows.ranges):
            yield _codes(weights, rows.param, start, stop, scale_of)

    shape = (rows.num_rows, *weights.shapes[rows.param][1:])
    name = compressed_tensors.scale_name(rows.name)
    scale = lambda: [compressed_tensors.to_weight_scale(scale_of(rows.param))]  # noqa: E731
    return [
        OutputTensor(rows.name, torch.float8_e4m3fn, shape, blocks),
        OutputTensor(name, torch.float32, (1,), scale),
    ]


def _codes(
    weights: Weights, param: str, start: int, stop: int, scale_of: Callable[[str], Tensor]
) -> Tensor:
    stored = weights.read(param, start, stop)
    if stored.format == E4M3:
        return stored.fp8
    kernels = ReferenceKernels()
    codes = kernels.cast(kernels.dequantize(stored), scale_of(param), E4M3)
    return codes.view(torch.float8_e4m3fn)


def _fp8_scale(weights: Weights, param: str) -> Tensor:
    """The stored scale; of a weight in another format that with which GEMMs cast it.

    It comes from the weight's amax, from its history of amaxes or its size, as the training has it.
    `InputError` where the GEMMs had one for every row or block, and for a history that is not here.
    """
    if weights.format(param) == E4M3:
        return weights.scale(param)
    granularity = weights.precision.scaling.by_kind()["weight"]
    if not granularity_by_name(granularity).is_per_tensor:
        raise InputError(
            f"the GEMMs of {weights.checkpoint.folder} cast their weights with scales per "
            f"{granularity}, and an FP8 export has one per tensor: export it with --to hf"
        )
    method = weights.precision.scaling_method
    if method == "delayed":
        return _delayed_scale(weights, param)
    kernels, amax = ReferenceKernels(), torch.zeros(())
    rows = weights.shapes[param][0]
    for start, stop in weights.blocks(param, ((0, rows),)):
        block = kernels.dequantize(weights.read(param, start, stop))
        amax = torch.maximum(amax, kernels.amax(block))
    if method == "static":
        return UnitScale.of_weight(weights.shapes[param][1])(amax)
    return scale_from_amax(amax, E4M3)


def _delayed_scale(weights: Weights, param: str) -> Tensor:
    """That of the step after the checkpoint; what exceeds it saturates, as in its GEMMs."""
    checkpoint = weights.checkpoint
    key = StateKey("amax_history", param.removesuffix(".weight"), "weight")
    if (stored := checkpoint.state.get(key)) is None:
        raise InputError(
            f"{checkpoint.folder} holds no {key}, from which delayed scaling takes the scale of "
            "the weight: export the complete checkpoint, not a release, or with --to hf"
        )
    length = tuple(stored.size)
    history = read_tensor(checkpoint, StoredTensor(str(key), torch.float32, length))
    return scales_of_histories(history[None], weights.precision, E4M3)[0]


def export_model(
    plan: Export, output: Path, largest: int, conversion: Mapping[str, Any], progress: Progressed
) -> None:
    """Write `plan` to the folder `output`, in files of at most `largest` bytes.

    Files that the same `conversion` has written before it was killed are kept.
    """
    files = plan_files(plan.tensors, largest)
    with conversion_folder(output, conversion) as work:
        for name, tensors in files.items():
            if (work / name).is_file():
                progress(sum(tensor.nbytes for tensor in tensors))
            else:
                write_file(work / name, tensors, progress)
        write_index(work, files)
        write_whole(work / CONFIG, json.dumps(plan.config, indent=2) + "\n")
        generation = {"_from_model_config": True, **token_ids(plan.tokenizer)}
        write_whole(work / GENERATION_CONFIG, json.dumps(generation, indent=2) + "\n")
        for name, content in tokenizer_files(plan.tokenizer).items():
            write_whole(work / name, content)
