"""Recipes: the formats of a layer's weights, gradients and GEMMs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fp8lm.config import PrecisionConfig
from fp8lm.config.precision import ScalingMethod
from fp8lm.kernels.interface import Kernels
from fp8lm.layers.amax_history import DelayedScale
from fp8lm.layers.quantizer import KnownScale, Quantizer
from fp8lm.layers.shard_spec import ShardSpec
from fp8lm.layers.tp_context import NO_TP, TPContext
from fp8lm.layers.unit_scale import UnitScale
from fp8lm.numerics import (
    BF16,
    E4M3,
    E5M2,
    FP32,
    PER_TENSOR,
    Format,
    Granularity,
    format_by_name,
    granularity_by_name,
)


@dataclass(frozen=True)
class OperandScaling:
    """How many elements of a GEMM's operand share a scale; formats without scales ignore it.

    `method`: where a scale comes from, a value of `precision.scaling_method`.
    """

    input: Granularity = PER_TENSOR
    weight: Granularity = PER_TENSOR
    grad_output: Granularity = PER_TENSOR
    method: ScalingMethod = "current"

    @classmethod
    def from_config(cls, precision: PrecisionConfig) -> OperandScaling:
        """What config section `precision` says."""
        scaling = precision.scaling.by_kind()
        return cls(
            granularity_by_name(scaling["input"]),
            granularity_by_name(scaling["weight"]),
            granularity_by_name(scaling["grad_output"]),
            precision.scaling_method,
        )

    def known_scale(self) -> KnownScale | None:
        """What gives a quantizer the scale of one tensor, unless that comes from its amax."""
        if self.method == "static":
            return UnitScale()
        return DelayedScale() if self.method == "delayed" else None

    def known_weight_scale(self, in_features: int) -> KnownScale | None:
        """The same for a weight [O, in_features]."""
        return UnitScale.of_weight(in_features) if self.method == "static" else self.known_scale()


@dataclass(frozen=True)
class GemmPrecision:
    """Formats of the operands of a linear layer's GEMMs, and the dtype of their results."""

    input: Format
    weight: Format
    grad_output: Format
    output: torch.dtype
    scaling: OperandScaling = OperandScaling()


FP8_GEMM = GemmPrecision(E4M3, E4M3, E5M2, torch.bfloat16)
BF16_GEMM = GemmPrecision(BF16, BF16, BF16, torch.bfloat16)
FP32_GEMM = GemmPrecision(FP32, FP32, FP32, torch.float32)
_HIGH_PRECISION_GEMMS = {"bf16": BF16_GEMM, "fp32": FP32_GEMM}


def gemm_precision(precision: PrecisionConfig) -> GemmPrecision:
    """Of the GEMMs that config section `precision` describes."""
    if precision.gemm != "fp8":
        return _HIGH_PRECISION_GEMMS[precision.gemm]
    return replace(
        FP8_GEMM,
        grad_output=format_by_name(precision.grad_output_format),
        scaling=OperandScaling.from_config(precision),
    )


@dataclass(frozen=True)
class Recipe:
    """Formats of the GEMM weights and their gradients, and those of everything around them.

    `high_precision` is the format of embeddings, norms and biases, and of activations between
    GEMMs; their gradients are fp32. `tp` is the tensor-parallel group of a layer.
    `cache_weight_operands`: see `cached_weight_operands`. `trainable` False: matrices without
    gradient buffers. `smooth_swiglu`: see `fp8lm.layers.smoothing`.
    """

    gemm: GemmPrecision
    weight: Format
    weight_grad: Format
    high_precision: Format
    first_last_layers_bf16: bool
    kernels: Kernels
    device: torch.device
    tp: TPContext = NO_TP
    cache_weight_operands: bool = False
    trainable: bool = True
    smooth_swiglu: bool = False

    @classmethod
    def from_config(
        cls,
        precision: PrecisionConfig,
        kernels: Kernels,
        device: torch.device,
        tp: TPContext = NO_TP,
    ) -> Recipe:
        """The recipe that config section `precision` describes."""
        return cls(
            gemm=gemm_precision(precision),
            weight=format_by_name(precision.params_dtype),
            weight_grad=format_by_name(precision.main_grads_dtype),
            high_precision=FP32 if precision.gemm == "fp32" else BF16,
            first_last_layers_bf16=precision.first_last_layers_bf16,
            kernels=kernels,
            device=device,
            tp=tp,
            cache_weight_operands=precision.cache_weight_operands,
            smooth_swiglu=precision.smooth_swiglu,
        )

    def for_inference(self) -> Recipe:
        """A model that only computes: frozen, each token scaled by itself, weights cast once.

        With a scale per token, a token's values do not depend on the others that are computed with
        it.
        """
        scaling = self.gemm.scaling
        of_token = replace(scaling.input, rows=1)  # a tensor's: of the row; blocks stay blocks
        # A history of amaxes is of all tokens.
        method: ScalingMethod = "static" if scaling.method == "static" else "current"
        gemm = replace(self.gemm, scaling=replace(scaling, input=of_token, method=method))
        recipe = replace(self, gemm=gemm, trainable=False, cache_weight_operands=True)
        return replace(recipe, smooth_swiglu=False)  # whose scales are of all tokens

    @property
    def head_gemm(self) -> GemmPrecision:
        """Formats of the output layer's GEMMs, never FP8."""
        return FP32_GEMM if self.high_precision == FP32 else BF16_GEMM

    def weight_quantizer(self, shape: tuple[int, ...], shard_spec: ShardSpec) -> Quantizer:
        """The quantizer of a linear layer's weight, whose shards are on the ranks of `tp`."""
        scaling = self.gemm.scaling
        is_cast = self.weight != self.gemm.weight
        return Quantizer(
            self.gemm.weight,
            self.kernels,
            granularity=scaling.weight,
            known_scale=scaling.known_weight_scale(shape[1]) if is_cast else None,
            share_amax=self.tp.max if self.tp.size > 1 else None,
            sharded_dim=shard_spec.dim,
        )

    def for_layer(self, index: int, num_layers: int) -> Recipe:
        """The recipe of transformer layer `index` of `num_layers`."""
        if not self.first_last_layers_bf16 or 0 < index < num_layers - 1:
            return self
        return replace(self, gemm=self.head_gemm, weight=self.high_precision, weight_grad=FP32)
