"""FP8 weights in the format of compressed-tensors, which vLLM and transformers read.

    X.weight          E4M3 codes, as they are trained
    X.weight_scale    [1], fp32: values are codes * weight_scale, where here they are codes / scale

Scales here are powers of two, whose reciprocal is exact. Tensors that are one here (q, k and v;
gate and up) have one scale, written beside each: vLLM joins them again and finds nothing to
requantize. Activations are quantized as they come, per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fp8lm.convert.safetensors_files import SafetensorsFolder
from fp8lm.runtime.errors import InputError

SCALE = "weight_scale"
_SUFFIX = f".{SCALE}"


def quantization_config(ignore: list[str]) -> dict[str, Any]:
    """Of config.json; `ignore` are the linear layers that are not quantized."""
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "tensor", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
    }


def scale_name(weight: str) -> str:
    """The name of the scale of a tensor `X.weight`."""
    return f"{weight.removesuffix('.weight')}{_SUFFIX}"


def to_weight_scale(scale: Tensor) -> Tensor:
    """The factor [1] by which codes are multiplied, for one that they are divided by."""
    return scale.reciprocal().view(1)


def from_weight_scale(weight_scale: Tensor) -> Tensor | None:
    """The scale here (0-d fp32), None where it cannot be expressed: not a power of two, not one.

    Nor can those below 2^-127, whose reciprocal FP32 does not hold.
    """
    if weight_scale.numel() != 1:
        return None
    value = float(weight_scale)
    if not 0 < value < math.inf or math.frexp(value)[0] != 0.5:
        return None
    scale = torch.tensor(1.0 / value)
    return scale if scale.isfinite() else None


def check_readable(config: Mapping[str, Any], source: str) -> bool:
    """Whether a config.json describes quantized weights; `InputError` for any but FP8 ones."""
    found = config.get("quantization_config")
    if not found:
        return False
    if not isinstance(found, dict):
        raise InputError(f"{source}: quantization_config = {found!r}: expected an object")
    method, layout = found.get("quant_method"), found.get("format")
    if method != "compressed-tensors" or layout not in ("float-quantized", "naive-quantized"):
        raise InputError(
            f"{source}: quantization_config is of {method}, format {layout}: only the format "
            "float-quantized of compressed-tensors is read"
        )
    return True


def read_scales(folder: SafetensorsFolder) -> dict[str, Tensor]:
    """The scales of all quantized tensors by the name of the weight, [1] or [rows, 1] in fp32.

    `InputError` for codes without a scale, a scale without codes, and one that is no scale.
    """
    scales = {}
    for name in folder.tensors:
        weight = f"{name.removesuffix(_SUFFIX)}.weight"
        if name.endswith(_SUFFIX) and weight in folder.tensors:  # else it has no place anyway
            scales[weight] = _read_scale(folder, name, weight)
    for name, tensor in folder.tensors.items():
        if tensor.dtype == torch.float8_e4m3fn and name not in scales:
            raise InputError(f"{folder.folder} holds no {scale_name(name)}")
    return scales


def _read_scale(folder: SafetensorsFolder, name: str, weight: str) -> Tensor:
    tensor, scale = folder.tensors[weight], folder.read(name).float()
    if tensor.dtype != torch.float8_e4m3fn:
        raise InputError(
            f"{folder.folder}: {weight} is {tensor.dtype} and has a {SCALE}: only FP8 codes "
            "(torch.float8_e4m3fn) are multiplied by one"
        )
    if scale.numel() != 1 and scale.shape != (*tensor.shape[:1], 1):
        raise InputError(
            f"{folder.folder}: {name} has shape {list(scale.shape)}: read is one scale, or one "
            f"for each of the {tensor.shape[0]} rows"
        )
    if not (scale.isfinite() & (scale > 0)).all():
        raise InputError(
            f"{folder.folder}: {name} is not finite and above 0: the model has diverged, or the "
            "file is damaged"
        )
    return scale


def check_unquantized(folder: SafetensorsFolder, source: str) -> None:
    """`InputError` for FP8 codes, of which `source`, a config.json, says nothing."""
    for name, tensor in folder.tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            raise InputError(
                f"{source} has no quantization_config, and {name} is FP8: it does not say by "
                "which scale codes are multiplied"
            )
