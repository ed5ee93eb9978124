"""The reference with AdamW, casts and decodes compiled: `precision.kernels=compiled`.

PyTorch's compiler (Inductor's C++) makes one pass over memory of what are tens of operations in
eager PyTorch. It rounds every operation where the reference does, so the bytes are the same.

A function is compiled for a kind of tensor (formats, rounding) when that comes first, for every
size. Inductor keeps what it made on disk (TORCHINDUCTOR_CACHE_DIR): a later run only loads it.

FP8 tensors go in and come out in PyTorch's FP8 dtypes, which are converted in vector registers;
formats that PyTorch has no dtype of are taken apart by arithmetic (`fp8lm.kernels.encoding`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.exc import TorchDynamoException

from fp8lm.kernels.adam import AdamFactors, adam_, rounds_to_nearest
from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.encoding import decode_root, encode
from fp8lm.kernels.interface import ELEMENTWISE
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.kernels.rounding import Rounding, noise_bits, round_stochastically
from fp8lm.numerics import E2M5, E4M3, E5M2, FP32, Format
from fp8lm.runtime.errors import InputError
from fp8lm.scaled_tensor import ScaledTensor

# Elements of a step's call: what lies between its loops stays in cache.
CHUNK = 1 << 18
# Of a cast: a call of a compiled function takes as long as an eager cast of some 30,000 numbers.
FEWEST = 1 << 16


class CompiledKernels(ReferenceKernels):
    """`ReferenceKernels` with some operations compiled; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self._compiled = cache(_compile)

    @property
    def backends(self) -> Mapping[str, str]:
        """See `Kernels`."""
        text = "AdamW, casts and decodes compiled by Inductor, the rest eager PyTorch"
        return MappingProxyType({**super().backends, ELEMENTWISE: text})

    def cast(self, x: Tensor, scale: Tensor, fmt: Format, *, saturate: bool = True) -> Tensor:
        """See `Kernels`."""
        # Compiled, bf16 to E5M2 is slower than eager, and so is E5M2 to bf16 in `decode`.
        in_vectors = fmt == E4M3 or (fmt == E5M2 and x.dtype == torch.float32)
        if not in_vectors or x.numel() < FEWEST or scale.ndim:
            return super().cast(x, scale, fmt, saturate=saturate)
        codes = self._compiled(_cast, fmt, saturate)([x.detach().reshape(-1)], scale)
        return codes.view(fmt.storage).view(x.shape)

    def decode(self, payload: Tensor, scale: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
        """See `ReferenceKernels`."""
        if fmt != E4M3 or payload.numel() < FEWEST:
            return super().decode(payload, scale, fmt, dtype)
        codes = payload.view(-1).view(fmt.dtype)
        return self._compiled(_decode, fmt, dtype)([codes], scale.reciprocal()).view(payload.shape)

    def adam(
        self, params: Sequence[AdamParam], table: AdamTable, coefficients: AdamCoefficients
    ) -> Tensor:
        """See `Kernels`."""
        skips = coefficients.skip is not None and bool(coefficients.skip)  # no wait on a CPU
        if skips or not params:
            return super().adam(params, table, coefficients)
        return torch.stack([self._step(param, table, coefficients) for param in params])

    def _gradient(self, stored: ScaledTensor) -> ScaledTensor:
        """As a compiled step reads it: E2M5 in blocks is decoded before, in cache."""
        if _gradient_format(stored.format) == stored.format:
            return stored
        return ScaledTensor(self.dequantize(stored).view(-1), torch.ones(()), FP32)

    def _step(self, param: AdamParam, table: AdamTable, c: AdamCoefficients) -> Tensor:
        step = self._compiled(_adam, AdamKind.of(param, table, c))
        scalars = _scalars(AdamFactors.of(c, param.weight_decay))
        # Copies: code for views is also of the size of what they are views of.
        scales, key = table.scales[param.row].clone(), table.noise_keys[param.row].clone()
        stored = [*param.states, *_present(param.model_param)]
        amax = torch.zeros(3)
        for start in range(0, param.gradient.payload.numel(), CHUNK):
            parts = [self._gradient(param.gradient.elements(start, start + CHUNK))]
            parts += [x.elements(start, start + CHUNK) for x in stored]
            payloads = [part.payload.view(part.format.dtype) for part in parts]
            numbers = param.index.numbers(start, payloads[0].numel(), amax.device)
            old = [part.inverse_scale() for part in parts]
            amax = torch.maximum(amax, step([*payloads, numbers], old, scales, key, scalars))
        return amax


@dataclass(frozen=True)
class AdamKind:
    """What of a step is compiled in: formats and rounding, whether an update is cut off."""

    gradient: Format
    states: tuple[Format, Format, Format]
    model: Format | None
    rounding: tuple[Rounding, Rounding, Rounding]
    cuts_off: bool

    @classmethod
    def of(cls, param: AdamParam, table: AdamTable, c: AdamCoefficients) -> AdamKind:
        """That of a step of `param`."""
        master, exp_avg, exp_avg_sq = (state.format for state in param.states)
        model = None if param.model_param is None else param.model_param.format
        cuts_off = c.largest_update is not None
        states = (master, exp_avg, exp_avg_sq)
        return cls(_gradient_format(param.gradient.format), states, model, table.rounding, cuts_off)

    @property
    def needs_amax(self) -> tuple[bool, bool, bool]:
        """Of which states the amax is wanted."""
        master, exp_avg, exp_avg_sq = (fmt.scaled for fmt in self.states)
        of_model = self.model is not None and self.model.scaled
        return master or of_model, exp_avg, exp_avg_sq


def _gradient_format(stored: Format) -> Format:
    return FP32 if stored == E2M5 else stored


def _present(x: ScaledTensor | None) -> list[ScaledTensor]:
    return [] if x is None else [x]


def _scalars(factors: AdamFactors) -> Tensor:
    """fp32, in the order of the fields. (A number in the code is compiled again for another.)"""
    values = (getattr(factors, field.name) for field in fields(factors))
    return torch.tensor([0.0 if value is None else float(value) for value in values])


def _compile(function: Callable[..., Any], *kind: Any) -> Callable[..., Any]:
    """`function` of this kind, its first arguments; then come vectors of one size, and tensors."""

    def of_kind(vectors: list[Tensor], *tensors: Any) -> Any:
        return function(*kind, vectors, *tensors)

    # PyTorch counts how often a code object is compiled, and gives up soon: each kind has its own.
    of_kind.__code__ = of_kind.__code__.replace(co_name=function.__name__)
    compiled = torch.compile(of_kind, fullgraph=True)

    def call(vectors: list[Tensor], *tensors: Any) -> Any:
        for vector in vectors:
            # Not dynamic=True: it makes variables of the formats' numbers, too, and PyTorch 2.11
            # cannot shift by them.
            maybe_mark_dynamic(vector, 0)
        try:
            with torch.no_grad():  # what is compiled under autograd is compiled again without
                return compiled(vectors, *tensors)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])
            raise InputError(
                f"precision.kernels=compiled: PyTorch's compiler fails here ({reason}); "
                "TORCHDYNAMO_VERBOSE=1 says more; or use precision.kernels=eager"
            ) from error

    return call


def _cast(fmt: Format, saturate: bool, vectors: list[Tensor], scale: Tensor) -> Tensor:
    # fp32: bf16 is not clamped in vectors. A product with a power of two has the same bits in both.
    scaled = vectors[0].float() * scale
    return (scaled.clamp(-fmt.max, fmt.max) if saturate else scaled).to(fmt.dtype)


def _decode(fmt: Format, dtype: torch.dtype, vectors: list[Tensor], inverse: Tensor) -> Tensor:
    return (vectors[0].float() * inverse).to(dtype)


def _adam(
    kind: AdamKind,
    vectors: list[Tensor],
    inverses: list[Tensor],
    scales: Tensor,
    key: Tensor,
    scalars: Tensor,
) -> Tensor:
    """One step of a part of a weight.

    `vectors` are payloads of gradient, states and model parameter, and the numbers of the elements
    in their weight; `inverses` those of the payloads' scales. Returns fp32 [3], as
    `fp8lm.kernels.adam.adam_step`.
    """
    *payloads, numbers = vectors
    factors = AdamFactors(*scalars.unbind())
    if not kind.cuts_off:
        factors = replace(factors, largest=None)
    formats = (kind.gradient, *kind.states)
    g, w, m, v = map(_values, payloads, inverses, formats)
    adam_(w, g, m, v, factors)
    zero = torch.zeros(())
    amaxes = [
        x.abs().amax() if needed else zero
        for x, needed in zip((w, m, v), kind.needs_amax, strict=True)
    ]
    noise = noise_bits(numbers, key)
    for value, target, scale, fmt, rounding in zip(
        (w, m, v), payloads[1:4], scales[1:].unbind(), kind.states, kind.rounding, strict=True
    ):
        target.copy_(_rounded(value, scale, fmt, rounding, noise))
    if kind.model is not None:
        payloads[4].copy_(_rounded(w, scales[0], kind.model, Rounding.NEAREST, noise))
    return torch.stack(amaxes)


def _values(payload: Tensor, inverse: Tensor, fmt: Format) -> Tensor:
    """fp32 values of stored numbers; what `adam_` writes into is no argument."""
    if not fmt.scaled:
        return payload.to(torch.float32, copy=True)
    if fmt.root:
        return (decode_root(payload) * inverse).square()
    return payload.float() * inverse


def _rounded(x: Tensor, scale: Tensor, fmt: Format, rounding: Rounding, noise: Tensor) -> Tensor:
    """fp32 `x` as stored, in the dtype of `fmt`."""
    if rounds_to_nearest(fmt, rounding):
        if fmt.root:
            raise ValueError(f"{fmt} is rounded stochastically: eager roots have other last bits")
        if not fmt.scaled:
            return x.to(fmt.dtype)
        scaled = x * scale
    else:
        only = rounding is Rounding.STOCHASTIC_SUBNORMALS
        scaled = round_stochastically(x, scale, fmt, noise, subnormals_only=only)
    if fmt.dtype == torch.uint8:
        return encode(scaled, fmt)
    return scaled.clamp(-fmt.max, fmt.max).to(fmt.dtype)
