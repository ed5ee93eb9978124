"""Section `precision`: the storage format of every tensor that training keeps.

A preset (see `fp8lm.config.presets`) only fills the keys left null; each key can be given a value
of its own.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fp8lm.config.guard import GuardConfig
from fp8lm.config.presets import PRESETS, PresetName
from fp8lm.config.section import Bool, Count, Section, Size, derived

GemmFormat = Literal["fp8", "bf16", "fp32"]
ParamsDtype = Literal["fp8_e4m3", "fp16", "bf16", "fp32"]
MainParamsDtype = Literal["fp32", "fp16", "bf16", "fp8_e4m3", "none"]
MainGradsDtype = Literal["fp8_e4m3", "fp8_e2m5", "bf16", "fp32"]
MomentDtype = Literal["fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2"]
SecondMomentDtype = Literal[MomentDtype, "fp8_e4m4_root"]
Rounding = Literal["nearest", "stochastic"]
WireFormat = Literal["fp8", "bf16"]
ScalingGranularity = Literal["tensor", "row", "block_1x128", "block_128x128", "mx_1x32"]
ScalingMethod = Literal["current", "delayed", "static"]
AmaxComputeAlgo = Literal["max", "most_recent"]
GradOutputFormat = Literal["fp8_e5m2", "fp8_e4m3"]
KernelsName = Literal["auto", "eager", "compiled", "triton"]
GradReduce = Literal["fp32_accumulate", "fp8_sum", "fp8_pre_scaling", "fp8_post_scaling"]
GradsWireFormat = Literal["fp8", "bf16", "fp32"]


class WireConfig(Section):
    """Formats of communication between ranks; null until `PrecisionConfig` fills them in."""

    # Every field is a wire: `fp8lm.comm.accounting` counts its bytes.

    gather: WireFormat | None = Field(
        None,
        description="Activations and gradients that sequence parallelism gathers. Null: what the "
        "preset says.",
    )
    reduce: WireFormat | None = Field(
        None, description="Partial sums of activations and gradients. Null: what the preset says."
    )
    grads: GradsWireFormat | None = Field(
        None,
        description="Gradients of linear layers' matrices to the ranks that step them; one kept "
        "in fewer bytes travels as it is. Null: what the preset says.",
    )
    params: WireFormat | None = Field(
        None,
        description="Stepped weights to all ranks: fp8, or in two bytes. Null: what the preset "
        "says; FP8 weights alone travel as fp8.",
    )
    pipeline: WireFormat | None = Field(
        None,
        description="Activations and their gradients between pipeline stages; fp8 has a scale per "
        "token. Null: what the preset says.",
    )

    def of(self, name: str) -> str:
        """The format of one wire, once it is filled in."""
        return getattr(self, name)


class ScalingConfig(Section):
    """How many elements of a GEMM's operand share a scale; null until filled in."""

    input: ScalingGranularity | None = Field(
        None,
        description="Inputs of linear layers in FP8 GEMMs; rows and blocks lie along what each "
        "GEMM sums over. Null: what the preset says.",
    )
    weight: ScalingGranularity | None = Field(
        None,
        description="Their weights; one stored in FP8 has one scale. Null: what the preset says.",
    )
    grad_output: ScalingGranularity | None = Field(
        None, description="Gradients of their outputs. Null: what the preset says."
    )

    def by_kind(self) -> dict[str, str]:
        """The granularity of every kind of tensor, once it is filled in."""
        return self.model_dump()


def _of_preset(key: str, description: str) -> Any:
    return derived(
        lambda precision: PRESETS[precision["preset"]][key], "what the preset says", description
    )


class PrecisionConfig(Section):
    """Storage formats; FP8 and FP16 tensors carry one fp32 scale each."""

    preset: PresetName = Field("o3", description="Fills the keys of this section left null.")
    gemm: GemmFormat = _of_preset("gemm", "Format of the operands of a linear layer's three GEMMs.")
    grad_output_format: GradOutputFormat = _of_preset(
        "grad_output_format",
        "Format of the output gradients that FP8 GEMMs read: fp8_e5m2 has the range, fp8_e4m3 a "
        "bit more of mantissa.",
    )
    params_dtype: ParamsDtype = _of_preset(
        "params_dtype", "Storage of the matrices that linear layers multiply with."
    )
    main_params_dtype: MainParamsDtype = _of_preset(
        "main_params_dtype",
        "Storage of the optimizer's master weights; none: the weight itself is the master.",
    )
    main_grads_dtype: MainGradsDtype = _of_preset(
        "main_grads_dtype",
        "Storage of weight gradients, which micro-batches accumulate into; fp8_e2m5, with a scale "
        "per up to 128 elements, keeps the sum of many.",
    )
    exp_avg_dtype: MomentDtype = _of_preset("exp_avg_dtype", "Storage of Adam's first moment.")
    exp_avg_sq_dtype: SecondMomentDtype = _of_preset(
        "exp_avg_sq_dtype",
        "Storage of Adam's second moment; fp8_e4m4_root keeps its square root, rounded so that the "
        "square is right on average.",
    )
    master_rounding: Rounding = _of_preset(
        "master_rounding",
        "How an updated master weight is rounded to its storage; stochastic rounding is seeded.",
    )
    first_last_layers_bf16: Bool = _of_preset(
        "first_last_layers_bf16",
        "Keep the first and the last transformer layer's linear layers in BF16.",
    )
    grad_reduce: GradReduce = Field(
        "fp32_accumulate",
        description="How FP8 gradients of data-parallel ranks are added: fp32_accumulate, where "
        "they are stepped; fp8_sum, in FP8 on the way with FP8-LM's automatic scaling; "
        "fp8_pre_scaling, fp8_post_scaling: the same with a fixed factor.",
    )
    cache_weight_operands: Bool = Field(
        False,
        description="Keep what dgrad reads of the weights while a step lasts, instead of making it "
        "anew in every micro-batch: on a GPU the transposed copy of an FP8 weight, one byte per "
        "parameter. The FP8 copy of a weight that is stored in another format is kept in any case.",
    )
    kernels: KernelsName = Field(
        "auto",
        description="What runs beside GEMMs and attention: eager, PyTorch's operations one by one; "
        "triton, fused kernels, on a GPU; compiled, by PyTorch's compiler, on a CPU with a C++ "
        "compiler; auto, triton on a GPU where it is installed, else eager. Casts, sums and "
        "optimizer steps have the same bits, exponentials on a GPU differ in the last one.",
    )
    smooth_swiglu: Bool = Field(
        False,
        description="Scale every channel of SwiGLU's output by a power of two before its cast to "
        "FP8, and take it back in the second matrix (Smooth-SwiGLU): for channels that grow far "
        "beyond the others.",
    )
    scaling_method: ScalingMethod = _of_preset(
        "scaling_method",
        "Where the scale of an FP8 GEMM's operand comes from: current, its own amax; delayed, the "
        "amaxes of earlier steps, with a scale of 1 in the first; static, sizes alone.",
    )
    fp8_amax_history_len: Count = Field(
        1024, le=65536, description="Steps that delayed scaling remembers the amax of."
    )
    fp8_amax_compute_algo: AmaxComputeAlgo = Field(
        "max", description="Which amax of its history delayed scaling takes."
    )
    fp8_margin: Size = Field(
        0, le=16, description="Powers of two that delayed scaling leaves free above the amax."
    )
    scaling: ScalingConfig = Field(
        default_factory=ScalingConfig,
        description="How many elements of an FP8 GEMM's operand share a scale: all (tensor), a "
        "row, or a block; mx_1x32 is MXFP8's.",
    )
    guard: GuardConfig = Field(
        default_factory=GuardConfig,
        description="Watches over the statistics of FP8 GEMMs.",
    )
    wire: WireConfig = Field(
        default_factory=WireConfig,
        description="What travels between ranks; an FP32 model's activations travel in FP32 where "
        "they do not in FP8, its gradients in what their key says.",
    )

    @model_validator(mode="after")
    def _groups_of_preset(self) -> PrecisionConfig:
        for name in ("scaling", "wire"):
            group = getattr(self, name)
            given = {k: v for k, v in group.model_dump().items() if v is not None}
            filled = type(group)(**{**PRESETS[self.preset][name], **given})
            object.__setattr__(self, name, filled)  # sections are frozen
        return self
