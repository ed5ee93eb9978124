"""The AdamW step of many tensors, in one launch for all that are alike: `fp8lm.kernels.adam`.

A program takes a chunk of one tensor. Every element is read once and written once, and everything
between is fp32 in registers. The operations and their order are those of `adam_`, each of them
rounded once: nothing is fused, quotients and roots are rounded correctly.

For each parameter of `o3` that is

    reads     gradient 1, master 2, m 1, v 2        writes    master 2, m 1, v 2, weight 1

bytes; scales and the tables of where tensors are add a few for each tensor and chunk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import decode, encode, fact, inverse_of, magnitude, root_of
from fp8lm.kernels.triton.rounding import cast_rounded, element_numbers, noise_bits
from fp8lm.kernels.triton.tensor_table import (
    ALIGNMENT,
    TensorTable,
    block_scales,
    pointer_at,
    tensor_at,
)
from fp8lm.numerics import FP32, Format
from fp8lm.scaled_tensor import ScaledTensor

CHUNK = 8192  # elements of a program, which looks up its tensor and adds to its amaxes once
_COLUMNS = tl.constexpr(17)  # of the table, in the order of `_row`
_WARPS = 4
# Of a thread: six programs run on a multiprocessor, and nothing spills. Some take 96 by themselves.
_REGISTERS = 80


class MultiTensorAdam:
    """Steps many tensors; keeps the tables of where they are from step to step."""

    def __init__(self) -> None:
        self._tables: dict[Kind, TensorTable] = defaultdict(TensorTable)

    def step(self, params: Sequence[AdamParam], table: AdamTable, c: AdamCoefficients) -> Tensor:
        """See `Kernels.adam`. ValueError for a payload that is not contiguous."""
        amax = torch.zeros(len(params), 3, device=table.scales.device)
        alike: dict[Kind, list[int]] = defaultdict(list)
        for position, param in enumerate(params):
            if param.gradient.payload.numel():
                alike[Kind.of(param)].append(position)
        for kind, positions in alike.items():
            members = [params[position] for position in positions]
            tensors = self._tables[kind]
            tensors.update(
                [_row(*member) for member in zip(positions, members, strict=True)],
                [triton.cdiv(param.gradient.payload.numel(), CHUNK) for param in members],
                amax.device,
            )
            _launch(kind, members, tensors, table, c, amax)
        return amax


@dataclass(frozen=True)
class Kind:
    """What is the same for all tensors of a launch.

    `scale_block`: elements of a gradient that share a scale; 0: all. `model` None: the master
    weight is the model parameter.
    """

    gradient: Format
    scale_block: int
    model: Format | None
    states: tuple[Format, Format, Format]
    weight_decay: float
    is_sharded: bool
    is_aligned: bool

    @classmethod
    def of(cls, param: AdamParam) -> Kind:
        """That of `param`; ValueError if a payload is not contiguous."""
        gradient, tensors = _gradient(param), (param.gradient, *_updated(param))
        master, exp_avg, exp_avg_sq = param.states
        if not all(tensor.payload.is_contiguous() for tensor in tensors):
            raise ValueError("an optimizer step needs contiguous payloads")
        sizes = (gradient.payload.numel(), *(tensor.payload.data_ptr() for tensor in tensors))
        return cls(
            gradient=gradient.format,
            scale_block=0 if gradient.granularity.is_per_tensor else gradient.shape[1],
            model=None if param.model_param is None else param.model_param.format,
            states=(master.format, exp_avg.format, exp_avg_sq.format),
            weight_decay=param.weight_decay,
            is_sharded=param.index.size > 1,
            is_aligned=all(size % ALIGNMENT == 0 for size in sizes),
        )

    @property
    def num_amaxes(self) -> int:
        """Of new master, m and v, those whose amax is collected: a copy of them has a scale."""
        master, *moments = self.states
        master_is_scaled = master.scaled or (self.model is not None and self.model.scaled)
        return master_is_scaled + sum(moment.scaled for moment in moments)

    def constants(self) -> dict[str, int | str]:
        """Compile-time arguments of `adam_chunk`."""
        # Four fp32 numbers are 128 bits, an access. Eight of FP8 are half one, but the registers of
        # 16 would leave too few threads to hide latencies; as would those of accesses one by one.
        per_thread = 4 if FP32 in (*self.states, self.model) else 8
        per_thread = per_thread if self.is_aligned else 2
        master, exp_avg, exp_avg_sq = (fmt.name for fmt in self.states)
        return {
            "GRADIENT": self.gradient.name,
            "MODEL": self.model.name if self.model else "none",
            "MASTER": master,
            "EXP_AVG": exp_avg,
            "EXP_AVG_SQ": exp_avg_sq,
            "SCALE_BLOCK": self.scale_block,
            "SHARDED": self.is_sharded,
            "ALIGNMENT": ALIGNMENT if self.is_aligned else 1,
            "CHUNK": CHUNK,
            "BLOCK": per_thread * 32 * _WARPS,
            "PER_THREAD": per_thread,
            "num_warps": _WARPS,
        }


def _gradient(param: AdamParam) -> ScaledTensor:
    """With one scale, or as [blocks, elements] with one each."""
    gradient = param.gradient
    if gradient.granularity.is_per_tensor:
        return gradient
    return gradient.elements(0, gradient.payload.numel())


def _updated(param: AdamParam) -> list[ScaledTensor]:
    return [*param.states, *([] if param.model_param is None else [param.model_param])]


def _row(position: int, param: AdamParam) -> list[int]:
    gradient, index, model = _gradient(param), param.index, param.model_param
    return [
        *(gradient.payload.numel(), param.row, position),
        *(index.first, index.block * index.inner, index.size, index.rank),
        *(x.data_ptr() for t in (gradient, *param.states) for x in (t.payload, t.scale)),
        0 if model is None else model.payload.data_ptr(),
    ]


def _launch(
    kind: Kind,
    params: list[AdamParam],
    tensors: TensorTable,
    table: AdamTable,
    c: AdamCoefficients,
    amax: Tensor,
) -> None:
    skip = None if c.skip is None else c.skip.view(torch.uint8)
    scalars = (c.clip_factor, c.bias_correction1, c.bias_correction2, c.largest_update, skip)
    read = [x for param in params for x in (_gradient(param), *param.states)]
    updated = [x.payload for param in params for x in _updated(param)]
    amaxes = amax[: len(params), : kind.num_amaxes]
    names = ("ROUND_MASTER", "ROUND_EXP_AVG", "ROUND_EXP_AVG_SQ")
    launch(
        adam_chunk,
        (len(tensors.owners),),
        tensors.rows,
        tensors.owners,
        table.scales,
        table.noise_keys,
        amax.view(torch.int32),
        *(amax if scalar is None else scalar for scalar in scalars),
        float(c.beta1),
        1.0 - c.beta1,
        float(c.beta2),
        1.0 - c.beta2,
        float(c.eps),
        1.0 - c.lr * kind.weight_decay,
        float(c.lr),
        reads=[
            *(x for tensor in read for x in (tensor.payload, tensor.scale)),
            *(tensors.rows, tensors.owners, amaxes),
            # As many of their rows as there are tensors.
            *(table.scales[: len(params)], table.noise_keys[: len(params)]),
            *(scalar for scalar in scalars if scalar is not None),
        ],
        writes=[*updated, amaxes],
        **kind.constants(),
        **{name: how.value for name, how in zip(names, table.rounding, strict=True)},
        CUTS_OFF=c.largest_update is not None,
        MAY_SKIP=skip is not None,
        maxnreg=_REGISTERS,
    )


@triton.jit
def adam_chunk(
    table_ptr,
    owner_ptr,
    scales_ptr,
    noise_keys_ptr,
    amax_ptr,
    clip_factor_ptr,
    bias_correction1_ptr,
    bias_correction2_ptr,
    largest_update_ptr,
    skip_ptr,
    beta1,
    m_weight,
    beta2,
    v_weight,
    eps,
    decay,
    lr,
    GRADIENT: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    MODEL: tl.constexpr,
    MASTER: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    ROUND_MASTER: tl.constexpr,
    ROUND_EXP_AVG: tl.constexpr,
    ROUND_EXP_AVG_SQ: tl.constexpr,
    CUTS_OFF: tl.constexpr,
    MAY_SKIP: tl.constexpr,
    SHARDED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_THREAD: tl.constexpr,
):
    """The kernel of `MultiTensorAdam`: one chunk of one tensor."""
    row_ptr = table_ptr + tl.load(owner_ptr + tl.program_id(0)).to(tl.int64) * _COLUMNS
    first = (tl.program_id(0) - tl.load(row_ptr)) * CHUNK
    numel = tl.multiple_of(tl.load(row_ptr + 1), ALIGNMENT)
    row, position = tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    first_number, section = tl.load(row_ptr + 4), tl.load(row_ptr + 5)
    size, rank = tl.load(row_ptr + 6), tl.load(row_ptr + 7)
    g_ptr, g_scale_ptr = tensor_at(row_ptr + 8, GRADIENT, ALIGNMENT)
    w_ptr, old_w_scale_ptr = tensor_at(row_ptr + 10, MASTER, ALIGNMENT)
    m_ptr, old_m_scale_ptr = tensor_at(row_ptr + 12, EXP_AVG, ALIGNMENT)
    v_ptr, old_v_scale_ptr = tensor_at(row_ptr + 14, EXP_AVG_SQ, ALIGNMENT)
    model_ptr = pointer_at(row_ptr + 16, MODEL, ALIGNMENT)

    g_inverse, w_inverse = inverse_of(tl.load(g_scale_ptr)), inverse_of(tl.load(old_w_scale_ptr))
    m_inverse = inverse_of(tl.load(old_m_scale_ptr))
    v_inverse = inverse_of(tl.load(old_v_scale_ptr))
    model_scale, w_scale = tl.load(scales_ptr + 4 * row), tl.load(scales_ptr + 4 * row + 1)
    m_scale, v_scale = tl.load(scales_ptr + 4 * row + 2), tl.load(scales_ptr + 4 * row + 3)
    noise_key = tl.load(noise_keys_ptr + row)
    clip_factor = tl.load(clip_factor_ptr)
    correction1 = tl.load(bias_correction1_ptr)
    inverse_correction2 = inverse_of(tl.load(bias_correction2_ptr))
    step_size = inverse_of(correction1) * lr
    written = tl.where(tl.load(skip_ptr) == 0, numel, 0) if MAY_SKIP else numel

    offsets = tl.arange(0, BLOCK)
    w_amax = tl.zeros((BLOCK // PER_THREAD,), tl.int32)
    m_amax, v_amax = w_amax, w_amax
    for start in range(first, tl.minimum(first + CHUNK, numel), BLOCK):
        inside = offsets < numel - start
        w = _read(w_ptr + start + offsets, inside, w_inverse, MASTER)
        m = _read(m_ptr + start + offsets, inside, m_inverse, EXP_AVG)
        v = _read(v_ptr + start + offsets, inside, v_inverse, EXP_AVG_SQ)
        if SCALE_BLOCK == 0:
            g = _read(g_ptr + start + offsets, inside, g_inverse, GRADIENT)
        else:
            g_scale = block_scales(g_scale_ptr, start, numel, SCALE_BLOCK, BLOCK, PER_THREAD)
            g = decode(tl.load(g_ptr + start + offsets, mask=inside, other=0), GRADIENT)
            g = tl.math.div_rn(g, g_scale)

        g = g * clip_factor
        m = m * beta1 + g * m_weight
        v = v * beta2 + g * g * v_weight
        update = tl.math.div_rn(m, root_of(v * inverse_correction2) + eps)
        if CUTS_OFF:
            update = _cut_off(update, tl.load(largest_update_ptr) * correction1)
        w = w * decay - update * step_size

        w_amax = _largest(w_amax, w, inside, PER_THREAD)
        m_amax = _largest(m_amax, m, inside, PER_THREAD)
        v_amax = _largest(v_amax, v, inside, PER_THREAD)
        number = element_numbers(first_number + start, offsets, section, size, rank, SHARDED)
        noise = noise_bits(number, noise_key)
        kept = offsets < written - start
        code = cast_rounded(w, w_scale, noise, MASTER, ROUND_MASTER)
        tl.store(w_ptr + start + offsets, code, mask=kept)
        code = cast_rounded(m, m_scale, noise, EXP_AVG, ROUND_EXP_AVG)
        tl.store(m_ptr + start + offsets, code, mask=kept)
        code = cast_rounded(v, v_scale, noise, EXP_AVG_SQ, ROUND_EXP_AVG_SQ)
        tl.store(v_ptr + start + offsets, code, mask=kept)
        if MODEL != "none":
            tl.store(model_ptr + start + offsets, encode(w * model_scale, MODEL), mask=kept)

    if _is_scaled(MASTER) or _is_scaled(MODEL):
        tl.atomic_max(amax_ptr + 3 * position, tl.max(w_amax, axis=0), sem="relaxed")
    if _is_scaled(EXP_AVG):
        tl.atomic_max(amax_ptr + 3 * position + 1, tl.max(m_amax, axis=0), sem="relaxed")
    if _is_scaled(EXP_AVG_SQ):
        tl.atomic_max(amax_ptr + 3 * position + 2, tl.max(v_amax, axis=0), sem="relaxed")


@triton.constexpr_function
def _is_scaled(FORMAT):
    return FORMAT != "none" and fact(FORMAT, "scaled")


@triton.jit
def _read(ptr, inside, inverse, FORMAT: tl.constexpr):
    value = decode(tl.load(ptr, mask=inside, other=0), FORMAT)
    if fact(FORMAT, "scaled"):
        value = value * inverse
    return value * value if fact(FORMAT, "root") else value


@triton.jit
def _cut_off(update, largest):
    """`update`, at most `largest` in magnitude; NaN of either survives."""
    update = tl.minimum(update, largest, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(update, -largest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(amax, values, inside, PER_THREAD: tl.constexpr):
    """Bits of the larger of `amax` and |`values`|, for what each thread holds."""
    bits = tl.where(inside, magnitude(values), 0)
    bits = tl.reshape(bits, (bits.shape[0] // PER_THREAD, PER_THREAD))
    return tl.maximum(amax, tl.max(bits, axis=1))
