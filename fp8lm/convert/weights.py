"""The weights of a checkpoint of this program, row block by row block.

master    the optimizer's copy, where one is stored: what FP32 and BF16 exports are made from
weight    the model parameter, whose FP8 payload and scale an FP8 export takes as they are
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fp8lm.checkpoint import Checkpoint, StateKey
from fp8lm.checkpoint.reader import WORD_TABLES, StoredTensor, read_tensor
from fp8lm.checkpoint.rows import StoredRows
from fp8lm.config import ModelConfig, PrecisionConfig
from fp8lm.convert.names import Ranges, param_shapes
from fp8lm.kernels import ReferenceKernels
from fp8lm.numerics import BF16, E4M3, E5M2, FP16, FP32, ROOT_E4M4, Format
from fp8lm.runtime.errors import InputError
from fp8lm.scaled_tensor import ScaledTensor

BLOCK_ELEMENTS = 2**24  # converted at once: 64 MB in fp32
_FORMATS = {fmt.dtype: fmt for fmt in (E4M3, E5M2, ROOT_E4M4, FP16, BF16, FP32)}


@dataclass(frozen=True)
class Weights:
    """The parameters of `checkpoint`, whose tables count as many rows as there are tokens."""

    checkpoint: Checkpoint
    model: ModelConfig
    precision: PrecisionConfig
    vocab_size: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Weights:
        """Of a checkpoint; `InputError` where its tensors are not those of its config."""
        config = checkpoint.common["config"]
        model = ModelConfig.model_validate(config["model"])
        precision = PrecisionConfig.model_validate(config["precision"])
        table = checkpoint.state.get(StateKey("weight", WORD_TABLES[0], "payload"))
        if table is None:
            raise InputError(f"{checkpoint.folder} holds no table {WORD_TABLES[0]}")
        tokenizer = checkpoint.common.get("tokenizer")
        rows = table.size[0] if tokenizer is None else tokenizer["identity"]["vocab_size"]
        if rows > table.size[0]:
            raise InputError(
                f"{checkpoint.folder}: its tokenizer has {rows} tokens, and the model's table "
                f"{table.size[0]} rows: it is another model's"
            )
        weights = cls(checkpoint, model, precision, rows)
        weights.check()
        return weights

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by name."""
        return param_shapes(self.model, self.vocab_size)

    def check(self) -> None:
        """`InputError` unless the stored weights are those that the config describes."""
        stored = {key.param for key in self.checkpoint.state if key.kind == "weight"}
        if differing := sorted(stored ^ self.shapes.keys()):
            raise InputError(
                f"{self.checkpoint.folder} holds another model than its config describes: "
                f"{differing[0]} is in one of them only"
            )
        for param, shape in self.shapes.items():
            found = self._rows.shape(str(StateKey("weight", param, "payload")), len(shape))
            wanted = (found[0], *shape[1:]) if param in WORD_TABLES else shape
            if found != wanted:
                raise InputError(
                    f"{self.checkpoint.folder}: {param} has shape {list(found)}, and its config "
                    f"describes {list(wanted)}"
                )

    @cached_property
    def _rows(self) -> StoredRows:
        return StoredRows(self.checkpoint)

    def rows_of_table(self, param: str) -> int:
        """Rows of a word table as it is stored, padding included."""
        return self._rows.shape(str(StateKey("weight", param, "payload")), 2)[0]

    def source_kind(self, param: str) -> str:
        """Where the most exact values of `param` are."""
        stored = StateKey("master", param, "payload") in self.checkpoint.state
        return "master" if stored else "weight"

    def describe(self, dtype: str) -> list[str]:
        """A line on what an export in `dtype` (fp32, bf16) is made from."""
        sources = sorted({self.source_kind(name) for name in self.shapes})
        line = f"weights: {dtype}, from the stored {' or '.join(sources)}"
        return [line + ", rounded to nearest" * (dtype == "bf16")]

    def format(self, param: str, kind: str = "weight") -> Format:
        """The format in which a `kind` of `param` is stored."""
        key = StateKey(kind, param, "payload")
        dtype = self.checkpoint.state[key].properties.dtype
        if dtype not in _FORMATS:
            raise InputError(f"{self.checkpoint.folder}: {key} has dtype {dtype}")
        return _FORMATS[dtype]

    def scale(self, param: str, kind: str = "weight") -> Tensor:
        """The scale of a `kind` of `param`, 1 where its format has none."""
        key = StateKey(kind, param, "scale")
        if not self.format(param, kind).scaled:
            return torch.ones(())
        if key not in self.checkpoint.state:
            raise InputError(f"{self.checkpoint.folder} holds no {key}")
        scale = read_tensor(self.checkpoint, StoredTensor(str(key), torch.float32, ()))
        if not torch.isfinite(scale) or scale <= 0:
            raise InputError(f"{self.checkpoint.folder}: {key} is {scale.item()}: it has diverged")
        return scale

    def read(self, param: str, start: int, stop: int, kind: str = "weight") -> ScaledTensor:
        """Rows `start` to `stop` as they are stored."""
        fmt, key = self.format(param, kind), StateKey(kind, param, "payload")
        rows = self._rows.read(str(key), start, stop, len(self.shapes[param]))
        return ScaledTensor(rows.view(fmt.storage), self.scale(param, kind), fmt)

    def values(
        self, param: str, ranges: Ranges, dtype: torch.dtype, kind: str = "weight"
    ) -> Iterator[Tensor]:
        """Values of the rows `ranges`, rounded to `dtype`, in blocks of rows.

        Of a moment, or for any other `kind` the most exact ones of the parameter.
        """
        kind = kind if kind.startswith("exp_avg") else self.source_kind(param)
        kernels = ReferenceKernels()
        for start, stop in self.blocks(param, ranges):
            yield kernels.dequantize(self.read(param, start, stop, kind)).to(dtype)

    def blocks(self, param: str, ranges: Ranges) -> Iterator[tuple[int, int]]:
        """`ranges` of rows cut to blocks of at most `BLOCK_ELEMENTS`."""
        width = max(1, *self.shapes[param][1:]) if len(self.shapes[param]) > 1 else 1
        most = max(1, BLOCK_ELEMENTS // width)
        for start, stop in ranges:
            for first in range(start, stop, most):
                yield first, min(first + most, stop)
