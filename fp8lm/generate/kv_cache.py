"""Keys and values of the tokens that were read, so that a step computes those of new tokens only.

    slot = sequence * capacity + position            and one more, which padding writes to

    as computed     BF16 (FP32 of an FP32 model)     2 bytes per element
    FP8             E4M3, a scale per token and head 1 + 4/D bytes per element

A token sees the slots of its sequence up to its own position: what a slot holds from before does
not matter, so that a sequence may be cut and read on from there.

Shapes: T tokens, G query groups of this rank, D head size, C capacity, b sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.generate.packing import PackedTokens
from fp8lm.kernels.interface import Kernels
from fp8lm.model.attention import CoreAttention
from fp8lm.numerics import PER_ROW, PER_TENSOR, Format
from fp8lm.scaled_tensor import ScaledTensor


@dataclass(frozen=True)
class CacheShape:
    """Sizes of the cache of one layer; `capacity` is in tokens per sequence."""

    sequences: int
    capacity: int
    groups: int
    head_size: int

    @property
    def slots(self) -> int:
        """Slots of a layer."""
        return self.sequences * self.capacity + 1


class KVCache:
    """The cache of `layers`, by their number in the model, in `fmt`."""

    def __init__(
        self,
        layers: Iterable[int],
        shape: CacheShape,
        fmt: Format,
        kernels: Kernels,
        device: torch.device,
    ) -> None:
        self.shape, self.kernels = shape, kernels
        self._layers = {
            index: tuple(_Store(shape, fmt, kernels, device) for _ in ("keys", "values"))
            for index in layers
        }

    @property
    def nbytes(self) -> int:
        """Bytes held by this rank."""
        return sum(store.nbytes for stores in self._layers.values() for store in stores)

    @property
    def unused_slot(self) -> int:
        """The slot that padding writes to."""
        return self.shape.slots - 1

    def core_of(self, packed: PackedTokens) -> Callable[[int], CoreAttention]:
        """Core attention of `packed` by layer: writes keys and values, and attends to the cache."""

        def of_layer(index: int) -> CoreAttention:
            def attend(q_T1ND: Tensor, k_T1GD: Tensor, v_T1GD: Tensor) -> Tensor:
                return self._attend(index, packed, q_T1ND, k_T1GD, v_T1GD)

            return attend

        return of_layer

    def _attend(
        self, index: int, packed: PackedTokens, q_T1ND: Tensor, k_T1GD: Tensor, v_T1GD: Tensor
    ) -> Tensor:
        keys, values = self._layers[index]
        keys.write(packed.slots_T, k_T1GD[:, 0])
        values.write(packed.slots_T, v_T1GD[:, 0])
        q_bNSD = q_T1ND[:, 0][packed.index_bS].transpose(1, 2)
        context_bNSD = self.kernels.attention_at(
            q_bNSD,
            keys.read(packed.sequences_b, q_T1ND.dtype),
            values.read(packed.sequences_b, q_T1ND.dtype),
            packed.positions_bS,
        )
        context = context_bNSD.transpose(1, 2).flatten(0, 1)[packed.place_T]
        return context.flatten(1)[:, None]


class _Store:
    """Keys or values of one layer: rows of D elements, G for each slot."""

    def __init__(
        self, shape: CacheShape, fmt: Format, kernels: Kernels, device: torch.device
    ) -> None:
        self.shape, self.kernels = shape, kernels
        self.granularity = PER_ROW if fmt.scaled else PER_TENSOR
        rows = (shape.slots * shape.groups, shape.head_size)
        self.held = ScaledTensor.zeros(rows, fmt, device, self.granularity)

    @property
    def nbytes(self) -> int:
        return self.held.nbytes

    def write(self, slots_T: Tensor, x_TGD: Tensor) -> None:
        rows = x_TGD.reshape(-1, self.shape.head_size).contiguous()
        new = self.kernels.quantize(rows, self.held.format, granularity=self.granularity)
        for held, written in self._tensors(new):
            held.view(self.shape.slots, -1)[slots_T] = written.view(len(slots_T), -1)

    def read(self, sequences_b: Tensor, dtype: torch.dtype) -> Tensor:
        """[b,G,C,D] in `dtype`."""
        shape, held = self.shape, self.held
        if len(sequences_b) == shape.sequences:  # all, which are in order
            rows = slice(0, (shape.slots - 1) * shape.groups)
            payload, scale = held.payload[rows], held.scale
            scale = scale[rows] if held.format.scaled else scale
        else:
            payload, scale = self._of(held.payload, sequences_b), held.scale
            scale = self._of(scale, sequences_b) if held.format.scaled else scale
        values = self.kernels.dequantize(
            ScaledTensor(payload, scale, held.format, self.granularity), dtype
        )
        return values.view(-1, shape.capacity, shape.groups, shape.head_size).transpose(1, 2)

    def _of(self, rows: Tensor, sequences_b: Tensor) -> Tensor:
        """Those of `rows` [slots * G, n] that belong to some sequences."""
        shape = self.shape
        per_sequence = rows[: (shape.slots - 1) * shape.groups].unflatten(0, (shape.sequences, -1))
        return per_sequence[sequences_b].flatten(0, 1)

    def _tensors(self, new: ScaledTensor) -> list[tuple[Tensor, Tensor]]:
        pairs = [(self.held.payload, new.payload)]
        return [*pairs, (self.held.scale, new.scale)] if self.held.format.scaled else pairs
