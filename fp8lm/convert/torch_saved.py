"""State dicts that torch.save wrote, with the FP8 weights of TransformerEngine and MS-AMP.

    TransformerEngine   Float8Tensor    _make_in_reduce_ex(data, fp8_dtype, fp8_scale_inv, ...)
    MS-AMP              ScalingTensor   value, meta.scale_inv, meta.qtype

    value = code * scale_inv                here: code / scale

(`transformer_engine/pytorch/tensor/float8_tensor.py`, `msamp/common/tensor/tensor.py`.) Neither
program is needed, and no code of a file is run: its classes are replaced by those of this module,
and everything unknown, as Megatron's arguments and random states are, by an object that does
nothing. Tensors are mapped from the file, not read.
"""

from __future__ import annotations

import math
import pickle
import types
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8lm.runtime.errors import InputError

_E4M3 = "kFloat8E4M3"
# TransformerEngine numbers E4M3 6, or 7 since it has 16-bit integers. A weight is never E5M2, which
# had the number 7 before.
_NUMBERS_OF_E4M3 = (6, 7)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SavedTensor:
    """Values, or the codes (uint8) and `scale_inv` (0-d fp32) of a tensor in E4M3.

    Values may have a `scale_inv`, too: MS-AMP's FP16 weights have.
    """

    data: Tensor
    scale_inv: Tensor | None = None

    @property
    def is_fp8(self) -> bool:
        """Whether `data` are codes."""
        return self.data.dtype == torch.uint8

    @property
    def scale(self) -> Tensor | None:
        """The scale here (0-d fp32) of codes; None where that cannot be: it is a power of two."""
        if self.scale_inv is None or math.frexp(float(self.scale_inv))[0] != 0.5:
            return None
        return self.scale_inv.reciprocal()

    def values(self, start: int, stop: int) -> Tensor:
        """Rows in fp32, or as they are where they have no scale."""
        rows = self.data[start:stop]
        rows = rows.view(torch.float8_e4m3fn) if self.is_fp8 else rows
        return rows if self.scale_inv is None else rows.float() * self.scale_inv


def read_state_dict(path: Path) -> dict[str, SavedTensor]:
    """The tensors of the model in a file of torch.save, by their dotted names.

    The model is what lies under `model`, or all. `InputError` for what is no such file, or holds
    tensors that cannot be read here.
    """
    found = _load(path)
    model = found.get("model", found)
    return {name: _saved(name, value, path) for name, value in _flat(model, "")}


def read_facts(path: Path) -> dict[str, Any]:
    """What lies beside the tensors in a file of torch.save: plain values, and objects that do
    nothing. Arguments of a program are a dict.
    """
    return _load(path)


def facts_in(data: bytes, place: str) -> dict[str, Any]:
    """The same of the bytes that torch.save wrote to `place`, of a dict or a list of one."""
    _check_archive(BytesIO(data), place)
    found = _unpickled(BytesIO(data), place)
    return _dict(found[0] if isinstance(found, list) and len(found) == 1 else found, place)


def _load(path: Path) -> dict[str, Any]:
    _check_archive(path, str(path))
    return _dict(_unpickled(path, str(path), mmap=True), str(path))


def _unpickled(source: Path | BytesIO, place: str, *, mmap: bool = False) -> Any:
    unpickling = types.SimpleNamespace(Unpickler=_Unpickler, __name__="fp8lm")
    try:
        return torch.load(
            source, map_location="cpu", mmap=mmap, weights_only=False, pickle_module=unpickling
        )
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except Exception as error:  # damaged bytes can fail in any way
        raise InputError(f"{place} is damaged: {str(error)[:200]}") from error


def _dict(found: Any, place: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise InputError(f"{place} holds no state dict")
    return found


def _check_archive(source: Path | BytesIO, place: str) -> None:
    try:
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{place} is damaged, or no file of torch.save (PyTorch 1.6 or newer)"
        ) from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(f"{place} is a TorchScript program, which is not run")


def _flat(content: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif str(key).endswith("_extra_state"):
            continue
        elif isinstance(value, Tensor | _Float8Tensor | _ScalingTensor):
            yield f"{prefix}{key}", value


def _saved(name: str, value: Any, path: Path) -> SavedTensor:
    if isinstance(value, Tensor):
        saved, known = SavedTensor(value), value.dtype in _FLOATS
    else:
        saved, known = value.saved()
        known = known and saved.scale_inv is not None
    if not known:
        raise InputError(f"{path}: {name} is in a format that is not read: save the model in BF16")
    if saved.scale_inv is not None and not 0 < float(saved.scale_inv) < math.inf:
        scale = float(saved.scale_inv)
        raise InputError(f"{path}: the scale of {name} is {scale}: it has diverged")
    return saved


class _Inert:
    """What takes the place of any object that is not wanted, whatever is done to it."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Nothing."""

    def extend(self, _: Any) -> None:
        """Nothing."""


class _TEDType:
    """`transformer_engine_torch.DType`, an enum of pybind11: its state is a number."""

    number = -1

    def __setstate__(self, number: int) -> None:
        self.number = number


class _Float8Tensor:
    """Stands in for TransformerEngine's class, and for the method that makes one."""

    def __init__(self, data: Tensor, fp8_dtype: _TEDType, fp8_scale_inv: Tensor, *_: Any) -> None:
        self.data, self.dtype, self.scale_inv = data, fp8_dtype, fp8_scale_inv

    def saved(self) -> tuple[SavedTensor, bool]:
        """The tensor, and whether its format is known."""
        known = getattr(self.dtype, "number", None) in _NUMBERS_OF_E4M3
        return SavedTensor(self.data, _one(self.scale_inv)), known


class _ScalingState:
    """Attributes that MS-AMP's classes pickle: of a tensor, its meta, and their type."""

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def of(self, key: str) -> Any:
        """An attribute, None where it is not there."""
        return getattr(self, "state", {}).get(key)


class _ScalingTensor(_ScalingState):
    """Stands in for MS-AMP's ScalingTensor and ScalingParameter."""

    def saved(self) -> tuple[SavedTensor, bool]:
        """The tensor, and whether its format is known."""
        value, meta = self.of("value"), self.of("meta")
        if not isinstance(value, Tensor) or not isinstance(meta, _ScalingState):
            return SavedTensor(torch.empty(0)), False
        qtype = meta.of("qtype")
        is_e4m3 = isinstance(qtype, _ScalingState) and qtype.of("name") == _E4M3
        known = is_e4m3 if value.dtype == torch.uint8 else value.dtype in _FLOATS
        return SavedTensor(value, _one(meta.of("scale_inv"))), known


def _one(scale_inv: Any) -> Tensor | None:
    """A scale per tensor, else None."""
    if not isinstance(scale_inv, Tensor) or scale_inv.numel() != 1:
        return None
    return scale_inv.float().reshape(())


def _member(owner: Any, name: Any) -> Any:
    """`getattr` of a pickle: of TransformerEngine's class the method that makes a tensor."""
    return _Float8Tensor if owner is _Float8Tensor else _Inert


class _Arguments(dict):
    """Stands in for argparse.Namespace."""

    def __setstate__(self, state: Any) -> None:
        self.update(state if isinstance(state, dict) else {})


def _with_no_hooks(data: Tensor, *_: Any) -> Tensor:
    return data


# What is called as it is: it makes tensors of the file's bytes, and their containers.
_TAKEN = ("collections.OrderedDict", "torch.Size", "torch._utils._rebuild_tensor_v2")
_REPLACED: Mapping[str, Any] = {
    "builtins.getattr": _member,
    "__builtin__.getattr": _member,  # its name in the protocol that torch.save uses
    "torch._utils._rebuild_parameter": _with_no_hooks,
    "argparse.Namespace": _Arguments,
    "transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor": _Float8Tensor,
    "transformer_engine.pytorch.float8_tensor.Float8Tensor": _Float8Tensor,
    "transformer_engine_torch.DType": _TEDType,
    "transformer_engine_extensions.DType": _TEDType,
    "msamp.common.tensor.tensor.ScalingTensor": _ScalingTensor,
    "msamp.nn.parameter.ScalingParameter": _ScalingTensor,
    "msamp.common.tensor.meta.ScalingMeta": _ScalingState,
    "msamp.common.dtype.dtypes.DType": _ScalingState,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (full := f"{module}.{name}") in _TAKEN:
            return super().find_class(module, name)
        return _REPLACED.get(full, _Inert)
