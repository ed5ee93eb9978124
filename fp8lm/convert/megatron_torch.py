"""Megatron's `torch` checkpoints, a state dict per model-parallel rank: the weights of one, in.

Names are megatron-core's, or those of Megatron-LM before it (MS-AMP's patch is one of that):

    language_model.encoder.layers.0.self_attention.query_key_value.weight
    decoder.layers.0.self_attention.linear_qkv.weight

FP8 weights of TransformerEngine (`--fp8-param-gather`) and MS-AMP whose scales are powers of two
stay as they are, code for code; others are multiplied out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fp8lm.checkpoint.files import LATEST
from fp8lm.checkpoint.reader import WORD_TABLES
from fp8lm.config import Config, ModelConfig
from fp8lm.convert.hf_export import DTYPES
from fp8lm.convert.megatron_names import LAYERS, key_of
from fp8lm.convert.names import param_shapes
from fp8lm.convert.release import Import, Incoming, precision_of
from fp8lm.convert.torch_saved import SavedTensor, read_state_dict
from fp8lm.data.tokenizer import build_tokenizer, padded_vocab_size
from fp8lm.numerics import BF16, E4M3, Format
from fp8lm.runtime.errors import InputError

FILE = "model_optim_rng.pt"
SUFFIXES = (".pt", ".pth", ".bin")
_BEFORE_CORE = (
    (r"^encoder\.", "decoder."),
    (r"\bfinal_norm\.", "final_layernorm."),
    (r"\binput_norm\.", "input_layernorm."),
    (r"\bpost_attention_(layer)?norm\.", "pre_mlp_layernorm."),
    (r"\bself_attention\.query_key_value\.", "self_attention.linear_qkv."),
    (r"\bself_attention\.dense\.", "self_attention.linear_proj."),
    (r"\bmlp\.dense_h_to_4h\.", "mlp.linear_fc1."),
    (r"\bmlp\.dense_4h_to_h\.", "mlp.linear_fc2."),
)
# Saved by some versions, and computed here.
_BUFFERS = re.compile(r"rotary_pos_emb|\.inv_freq$|core_attention")


def find_file(folder: Path) -> Path | None:
    """The state dict that `folder` is, or holds as Megatron writes it; None: it holds none.

    `InputError` for one in several files.
    """
    if folder.is_file():
        return folder if folder.suffix in SUFFIXES else None
    latest = folder / LATEST
    if latest.is_file():
        number = latest.read_text().strip()[:40]
        folder = folder / (f"iter_{int(number):07d}" if number.isdecimal() else Path(number).name)
    found = sorted(folder.glob(f"mp_rank_*/{FILE}"))
    if len(found) > 1:
        raise InputError(
            f"{folder} is of {len(found)} model-parallel ranks: save it with Megatron's "
            "--ckpt-format torch_dist, whose layers can be put together"
        )
    return found[0] if found else None


def plan_import(file: Path, config: Config, dtype: str | None) -> Import:
    """The weights in `file` as the model of `config`, stored in `dtype` (None: their own)."""
    tokenizer = build_tokenizer(config.tokenizer)
    stored = _Stored.of(file, config.model)
    if tokenizer.vocab_size > stored.vocab_size:
        raise InputError(
            f"the tokenizer of the config has {tokenizer.vocab_size} tokens, and the table in "
            f"{file} {stored.vocab_size} rows: it is another model's"
        )
    as_it_is = dtype is None and stored.is_exact
    kept = dtype or stored.dtype
    params = stored.params(None if as_it_is else DTYPES[kept])
    lines = [f"weights: {kept}" + ", dequantized" * stored.has_fp8]
    if as_it_is:
        lines = ["weights: FP8 codes and scales as they are"]
        lines[0] += ", the rest rounded to BF16" * (stored.dtype != "bf16")
    lines[0] += ", without optimizer states"
    outer = as_it_is and bool(stored.unquantized)
    precision = precision_of("fp8" if as_it_is else kept, outer_layers_bf16=outer)
    return Import(config.model.model_dump(mode="json"), precision, tokenizer, params, lines)


class _Stored:
    """The tensors of a state dict by the names of parameters here."""

    def __init__(self, tensors: dict[str, SavedTensor], model: ModelConfig, vocab: int) -> None:
        self.tensors, self.model, self.vocab_size = tensors, model, vocab
        self.shapes = param_shapes(model, vocab)

    @classmethod
    def of(cls, file: Path, model: ModelConfig) -> _Stored:
        """`InputError` where they are not those of `model`."""
        held = _renamed(read_state_dict(file))
        if (table := held.get(WORD_TABLES[0])) is None:
            raise InputError(f"{file} holds no tensor {WORD_TABLES[0]}")
        stored = cls({}, model, table.data.shape[0])
        for param, shape in stored.shapes.items():
            name = next((name for name in _names(param) if name in held), None)
            if name is None:
                raise InputError(f"{file} holds no tensor {param}")
            tensor = held.pop(name)
            if tuple(tensor.data.shape) != shape:
                raise InputError(
                    f"{file}: {name} has shape {list(tensor.data.shape)}, and the config describes "
                    f"{list(shape)}"
                )
            stored.tensors[param] = tensor
        left = [name for name in held if not _BUFFERS.search(name)]
        if left and not (left == ["output_layer.weight"] and not stored.unties):
            raise InputError(f"{file}: {left[0]} has no place in the model of the config")
        return stored

    @property
    def unties(self) -> bool:
        """Whether the output layer has a matrix of its own."""
        return self.model.untie_embeddings_and_output_weights

    @property
    def has_fp8(self) -> bool:
        """Whether some weights are FP8."""
        return any(tensor.is_fp8 for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """bf16 where all is BF16 or FP8, else fp32, which holds every other dtype."""
        kept = (torch.bfloat16, torch.uint8)
        return "bf16" if all(t.data.dtype in kept for t in self.tensors.values()) else "fp32"

    @property
    def unquantized(self) -> set[int]:
        """Layers whose matrices have no codes, where others have."""
        return {
            _layer(param) for param, tensor in self._matrices().items() if tensor.scale_inv is None
        }

    def _matrices(self) -> Mapping[str, SavedTensor]:
        return {
            param: tensor
            for param, tensor in self.tensors.items()
            if ".linear_" in param and param.endswith(".weight")
        }

    @property
    def is_exact(self) -> bool:
        """Whether codes and scales are such as are trained here, so that they can stay."""
        matrices, outer = self._matrices(), self.unquantized
        if not self.has_fp8 or outer not in (set(), {0, self.model.num_layers - 1}):
            return False
        quantized = {p: t for p, t in matrices.items() if _layer(p) not in outer}
        scaled = [tensor for tensor in self.tensors.values() if tensor.scale_inv is not None]
        return len(scaled) == len(quantized) and all(
            tensor.is_fp8 and tensor.scale is not None for tensor in quantized.values()
        )

    def params(self, fmt: Format | None) -> dict[str, Incoming]:
        """All parameters in `fmt`; None: FP8 matrices as they are, the rest in BF16."""
        found = {}
        for param, shape in self.shapes.items():
            tensor, own, scale = self.tensors[param], fmt or BF16, None
            if fmt is None and tensor.is_fp8:
                own, scale = E4M3, tensor.scale
            if param in WORD_TABLES:
                rows = padded_vocab_size(shape[0], self.model.make_vocab_size_divisible_by, 1)
                shape = (rows, *shape[1:])
            gated = self.model.swiglu and ".linear_fc1." in param
            found[param] = Incoming(shape, own, _reader(tensor, own), scale, 2 if gated else None)
        return found


def _reader(tensor: SavedTensor, fmt: Format) -> Callable[[int, int], Tensor]:
    """Reads rows in the dtype of `fmt`, codes as they are for E4M3, with zeros after the last."""

    def read(start: int, stop: int) -> Tensor:
        if fmt == E4M3:
            return tensor.data[start:stop].view(fmt.dtype)
        rows = tensor.values(start, stop).to(fmt.dtype)
        padding = rows.new_zeros(stop - start - len(rows), *rows.shape[1:])
        return torch.cat((rows, padding)) if len(padding) else rows

    return read


def _renamed(held: dict[str, SavedTensor]) -> dict[str, SavedTensor]:
    """By megatron-core's names, without what is before them."""
    table = next((name for name in held if name.endswith(WORD_TABLES[0])), "")
    prefix, found = table.removesuffix(WORD_TABLES[0]), {}
    for name, tensor in held.items():
        name = name.removeprefix(prefix)
        for old, new in _BEFORE_CORE:
            name = re.sub(old, new, name)
        found[name] = tensor
    return found


def _names(param: str) -> tuple[str, ...]:
    """Where a parameter may be: TransformerEngine's layers hold the norm before them."""
    key, layer = key_of(param)
    if layer is None:
        return (param,)
    return param, f"{LAYERS}{layer}.{key.removeprefix(LAYERS)}"


def _layer(param: str) -> int:
    return int(param.removeprefix(LAYERS).partition(".")[0])
