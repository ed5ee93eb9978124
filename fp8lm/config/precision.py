"""Section `precision`: the storage format of every tensor that training keeps.

The presets are the levels of FP8-LM (arXiv 2310.18313, section 2 and Table 6) and two baselines:
`bf16` and `te`, which computes GEMMs in FP8 and keeps everything else as BF16 training does.
`o3_long` is o3 for many micro-batches a step, of which a running sum in E4M3 loses the small ones:
it adds gradients up in E2M5 (see `fp8lm.numerics.formats`). `o4` is o3 with the second moment in
eight bits too, as its root in E4M4: 2 + 4/d bytes per parameter over d data-parallel ranks.
A preset only fills the keys left null; each key can be given a value of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, model_validator

from fp8lm.config.section import Bool, Section, derived

GemmFormat = Literal["fp8", "bf16", "fp32"]
ParamsDtype = Literal["fp8_e4m3", "fp16", "bf16", "fp32"]
MainParamsDtype = Literal["fp32", "fp16", "bf16", "fp8_e4m3", "none"]
MainGradsDtype = Literal["fp8_e4m3", "fp8_e2m5", "bf16", "fp32"]
MomentDtype = Literal["fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2"]
SecondMomentDtype = Literal[MomentDtype, "fp8_e4m4_root"]
Rounding = Literal["nearest", "stochastic"]
PresetName = Literal["bf16", "te", "o1", "o2", "o3", "o3_long", "o4"]
WireFormat = Literal["fp8", "bf16"]
KernelsName = Literal["auto", "eager", "triton"]
GradReduce = Literal["fp32_accumulate", "fp8_sum", "fp8_pre_scaling", "fp8_post_scaling"]
GradsWireFormat = Literal["fp8", "bf16", "fp32"]
_Moments = tuple[MomentDtype, SecondMomentDtype]
_Wires = tuple[WireFormat, GradsWireFormat, WireFormat]  # activations, gradients, weights


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


def _preset(
    gemm: GemmFormat,
    params: ParamsDtype,
    main_params: MainParamsDtype,
    main_grads: MainGradsDtype,
    moments: _Moments,
    rounding: Rounding,
    wires: _Wires,
) -> Mapping[str, Any]:
    exp_avg, exp_avg_sq = moments
    wire, grads, params_wire = wires
    return MappingProxyType(
        {
            "gemm": gemm,
            "params_dtype": params,
            "main_params_dtype": main_params,
            "main_grads_dtype": main_grads,
            "exp_avg_dtype": exp_avg,
            "exp_avg_sq_dtype": exp_avg_sq,
            "master_rounding": rounding,
            "first_last_layers_bf16": False,
            "wire": MappingProxyType(
                dict.fromkeys(WireConfig.model_fields, wire)
                | {"grads": grads, "params": params_wire}
            ),
        }
    )


_FP32_STATES: _Moments = ("fp32", "fp32")
_FP8_STATES: _Moments = ("fp8_e4m3", "fp16")
_FP8_MOMENTS: _Moments = ("fp8_e4m3", "fp8_e4m4_root")
_BF16_WIRES: _Wires = ("bf16", "fp32", "bf16")
# FP16 weights are sent in two bytes.
_FP8_WIRES: _Wires = ("fp8", "fp8", "fp8")
_FP8_BUT_WEIGHTS: _Wires = ("fp8", "fp8", "bf16")

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "bf16": _preset("bf16", "bf16", "fp32", "fp32", _FP32_STATES, "nearest", _BF16_WIRES),
        "te": _preset("fp8", "bf16", "fp32", "fp32", _FP32_STATES, "nearest", _BF16_WIRES),
        "o1": _preset(
            "fp8", "fp16", "none", "fp8_e4m3", _FP32_STATES, "stochastic", _FP8_BUT_WEIGHTS
        ),
        "o2": _preset(
            "fp8", "fp16", "none", "fp8_e4m3", _FP8_STATES, "stochastic", _FP8_BUT_WEIGHTS
        ),
        "o3": _preset("fp8", "fp8_e4m3", "fp16", "fp8_e4m3", _FP8_STATES, "stochastic", _FP8_WIRES),
        "o3_long": _preset(
            "fp8", "fp8_e4m3", "fp16", "fp8_e2m5", _FP8_STATES, "stochastic", _FP8_WIRES
        ),
        "o4": _preset(
            "fp8", "fp8_e4m3", "fp16", "fp8_e4m3", _FP8_MOMENTS, "stochastic", _FP8_WIRES
        ),
    }
)


def _of_preset(key: str, description: str) -> Any:
    return derived(
        lambda precision: PRESETS[precision["preset"]][key], "what the preset says", description
    )


class PrecisionConfig(Section):
    """Storage formats; FP8 and FP16 tensors carry one fp32 scale each."""

    preset: PresetName = Field("o3", description="Fills the keys of this section left null.")
    gemm: GemmFormat = _of_preset("gemm", "Format of the operands of a linear layer's three GEMMs.")
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
        description="Keep what GEMMs read of the weights while a step lasts, instead of making it "
        "anew in every micro-batch: the copy in the GEMM's format of a weight stored in another, "
        "and on a GPU the transposed copy of an FP8 weight that dgrad reads. In FP8 one byte per "
        "parameter each.",
    )
    kernels: KernelsName = Field(
        "auto",
        description="What runs on a GPU beside GEMMs and attention: triton, fused kernels; eager, "
        "PyTorch's operations one by one; auto, triton where it is installed. Casts, sums and "
        "optimizer steps have the same bits, exponentials differ in the last one. A CPU has eager.",
    )
    wire: WireConfig = Field(
        default_factory=WireConfig,
        description="What travels between ranks; an FP32 model's activations travel in FP32 where "
        "they do not in FP8, its gradients in what their key says.",
    )

    @model_validator(mode="after")
    def _wires_of_preset(self) -> PrecisionConfig:
        given = {k: v for k, v in self.wire.model_dump().items() if v is not None}
        wire = WireConfig(**{**PRESETS[self.preset]["wire"], **given})
        object.__setattr__(self, "wire", wire)  # sections are frozen
        return self
