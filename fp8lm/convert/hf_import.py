"""A HuggingFace model read as a checkpoint.

Weights are stored in the folder's own dtype (FP16 in fp32, which holds it), or in another; FP8
codes and scales that were trained here stay what they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8lm.checkpoint.reader import WORD_TABLES
from fp8lm.config import ModelConfig
from fp8lm.convert import compressed_tensors
from fp8lm.convert.architectures import from_hugging_face
from fp8lm.convert.hf_export import CONFIG, DTYPES
from fp8lm.convert.names import (
    NamedRows,
    head_of,
    hugging_face_names,
    param_shapes,
)
from fp8lm.convert.release import Import, Incoming, precision_of
from fp8lm.convert.safetensors_files import (
    SafetensorsFolder,
)
from fp8lm.convert.tokenizers import find_tokenizer
from fp8lm.convert.weights import BLOCK_ELEMENTS
from fp8lm.data.tokenizer import padded_vocab_size
from fp8lm.numerics import BF16, E4M3, Format
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import read_regular

LARGEST_CONFIG = 2**22  # bytes
_PADDING = 128  # rows of a table are a multiple of this, so that tensor-parallel ranks divide them
# Buffers that some versions have saved beside the weights.
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))$")


def plan_import(
    folder: Path,
    dtype: str | None,
    tokenizer_model: str | None = None,
    tokenizer_type: str | None = None,
) -> Import:
    """The model in `folder`, stored in `dtype` (fp32, bf16; None: its own).

    `InputError` for one that cannot be expressed here, or is not complete.
    """
    config = _read_config(folder)
    source = str(folder / CONFIG)
    keys = from_hugging_face(config, source)
    model = ModelConfig.model_validate(keys)
    files = SafetensorsFolder(folder)
    reader = _Reader(files, model, config["model_type"], _scales(files, config, source))
    if (said := config.get("vocab_size", reader.vocab_size)) != reader.vocab_size:
        raise InputError(
            f"{source}: vocab_size = {said!r}, and the model's table has {reader.vocab_size} rows: "
            "the weights are another model's"
        )
    tokenizer = find_tokenizer(folder, reader.vocab_size, tokenizer_model, tokenizer_type)
    as_it_is = dtype is None and reader.is_exact
    kept = dtype or reader.dtype
    params = dict(reader.params(None if as_it_is else DTYPES[kept]))
    what = "FP8 codes and scales as they are" if as_it_is else kept
    lines = [f"architecture: {config['model_type']}", f"weights: {what}"]
    if reader.scales and not as_it_is:
        lines[-1] += ", dequantized"
    if not tokenizer.files:
        lines.append(f"no tokenizer in {folder}: token ids alone")
    outer = as_it_is and bool(reader.unquantized)
    precision = precision_of("fp8" if as_it_is else kept, outer_layers_bf16=outer)
    return Import(keys, precision, tokenizer, params, lines)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(
            f"--input {folder} is no folder: names on a hub are not downloaded, fetch it first "
            "(hf download NAME --local-dir DIR)"
        )
    try:
        config = json.loads(read_regular((folder / CONFIG).resolve(), LARGEST_CONFIG))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {CONFIG}: no HuggingFace model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG} is not a JSON object")
    return config


def _scales(files: SafetensorsFolder, config: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    if compressed_tensors.check_readable(config, source):
        return compressed_tensors.read_scales(files)
    compressed_tensors.check_unquantized(files, source)
    return {}


class _Reader:
    """The parameters of a model, read from the tensors of a HuggingFace folder."""

    def __init__(
        self,
        files: SafetensorsFolder,
        model: ModelConfig,
        kind: str,
        scales: dict[str, Tensor],
    ) -> None:
        self._files, self._model, self._kind, self.scales = files, model, kind, scales
        shapes = param_shapes(model, 1)
        (table,) = (r for r in hugging_face_names(model, kind, shapes) if r.param == WORD_TABLES[0])
        self.vocab_size = self._files.tensors[self._actual(table.name)].shape[0]
        self.shapes = param_shapes(model, self.vocab_size)
        self._named: dict[str, list[NamedRows]] = {}
        for rows in hugging_face_names(model, kind, self.shapes):
            self._named.setdefault(rows.param, []).append(rows)
        self._check()

    def _actual(self, name: str) -> str:
        """The name under which a tensor is stored: some versions leave the model's prefix out."""
        for candidate in (name, name.partition(".")[2], name.replace("embed_out.", "lm_head.")):
            if candidate in self._files.tensors:
                return candidate
        raise InputError(f"{self._files.folder} holds no tensor {name}")

    def _check(self) -> None:
        used = set()
        for rows in self._all():
            name = self._actual(rows.name)
            found = self._files.tensors[name].shape
            wanted = (rows.num_rows, *self.shapes[rows.param][1:])
            if found != (wanted[::-1] if rows.transposed else wanted):
                raise InputError(
                    f"{self._files.folder}: {name} has shape {list(found)}, and {CONFIG} describes "
                    f"{list(wanted)}"
                )
            used |= {name, compressed_tensors.scale_name(name)}
        if not self._model.untie_embeddings_and_output_weights:
            heads = {f"{head_of(self._kind)}.weight", "lm_head.weight"}
            for name in sorted(heads & self._files.tensors.keys()):
                self._check_is_table(name)
            used |= heads
        left = [n for n in self._files.tensors if n not in used and not _BUFFERS.search(n)]
        if left:
            raise InputError(f"{self._files.folder}: tensor {left[0]} has no place in the model")

    def _check_is_table(self, name: str) -> None:
        """`InputError` unless a tied head is the table again, where it is stored at all."""
        (rows,) = self._named[WORD_TABLES[0]]
        table, (count, width) = self._actual(rows.name), self.shapes[WORD_TABLES[0]]
        most, read = max(1, BLOCK_ELEMENTS // width), self._files.read
        is_same = self._files.tensors[name].shape == (count, width) and all(
            torch.equal(
                read(name, first, first + most).float(), read(table, first, first + most).float()
            )
            for first in range(0, count, most)
        )
        if not is_same:
            raise InputError(
                f"{self._files.folder}: {name} differs from {table}, and {CONFIG} has "
                "tie_word_embeddings = true: set it to false, or leave the tensor out"
            )

    def _all(self) -> Iterator[NamedRows]:
        for named in self._named.values():
            yield from named

    @property
    def dtype(self) -> str:
        """bf16 where all is BF16 or FP8, else fp32, which holds every other dtype."""
        dtypes = {self._files.tensors[self._actual(rows.name)].dtype for rows in self._all()}
        return "bf16" if dtypes <= {torch.bfloat16, torch.float8_e4m3fn} else "fp32"

    @property
    def unquantized(self) -> set[int]:
        """Layers whose matrices have no scale, where others have."""
        return {_layer(rows.param) for rows in self._matrices() if self._scale(rows) is None}

    def _matrices(self) -> Iterator[NamedRows]:
        return (r for r in self._all() if ".linear_" in r.param and r.param.endswith(".weight"))

    def _scale(self, rows: NamedRows) -> Tensor | None:
        return self.scales.get(self._actual(rows.name))

    @property
    def is_exact(self) -> bool:
        """Whether codes and scales are such as are trained here, so that they can stay."""
        if not self.scales or self.dtype != "bf16":
            return False
        outer = {0, self._model.num_layers - 1}
        if self.unquantized not in (set(), outer):
            return False
        for param, named in self._named.items():
            scales = [self._scale(rows) for rows in named]
            if all(scale is None for scale in scales):
                continue
            own = [None if s is None else compressed_tensors.from_weight_scale(s) for s in scales]
            if any(s is None for s in own) or len({float(s) for s in own if s is not None}) > 1:
                return False
            if _layer(param) in self.unquantized:
                return False
        return True

    def params(self, fmt: Format | None) -> Iterator[tuple[str, Incoming]]:
        """All parameters in `fmt`; None: FP8 matrices as they are, the rest in BF16."""
        for param, shape in self.shapes.items():
            own, scale = fmt or BF16, None
            quantized = self._scale(self._named[param][0])
            if fmt is None and quantized is not None:
                own, scale = E4M3, compressed_tensors.from_weight_scale(quantized)
            if param in WORD_TABLES:
                shape = (padded_vocab_size(shape[0], _PADDING, 1), *shape[1:])
            gated = self._model.swiglu and ".linear_fc1." in param
            yield (
                param,
                Incoming(shape, own, self._rows_of(param, own), scale, 2 if gated else None),
            )

    def _rows_of(self, param: str, fmt: Format) -> Callable[[int, int], Tensor]:
        def read(start: int, stop: int) -> Tensor:
            found = torch.zeros(stop - start, *self.shapes[param][1:], dtype=fmt.dtype)
            for rows in self._named[param]:
                _fill(found, start, rows, lambda rows, a, b: self._cast(rows, a, b, fmt))
            return found

        return read

    def _cast(self, rows: NamedRows, start: int, stop: int, fmt: Format) -> Tensor:
        """Rows of a tensor there in `fmt`: codes as they are for E4M3, else values."""
        name = self._actual(rows.name)
        if rows.transposed:
            found = self._files.read(name).t()[start:stop]
        else:
            found = self._files.read(name, start, stop)
        if not found.float().isfinite().all():
            raise InputError(
                f"--input: {name} has NaN or infinite numbers: the files are damaged, or their "
                "training had failed; take another checkpoint of that model"
            )
        scale = self.scales.get(name)
        if scale is None or fmt == E4M3:
            return found.to(fmt.dtype)
        factor = scale if scale.numel() == 1 else scale[start:stop]
        return (found.float() * factor).to(fmt.dtype)


def _layer(param: str) -> int:
    return int(param.removeprefix("decoder.layers.").partition(".")[0])


def _fill(
    target: Tensor, first: int, rows: NamedRows, read: Callable[[NamedRows, int, int], Tensor]
) -> None:
    """Set what `target`, rows from number `first` on, has of the ranges of `rows`."""
    before = 0  # rows of the tensor there
    for start, stop in rows.ranges:
        low, high = max(start, first), min(stop, first + len(target))
        if low < high:
            shift = before - start
            target[low - first : high - first] = read(rows, low + shift, high + shift)
        before += stop - start
