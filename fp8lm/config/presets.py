"""Presets of section `precision`: FP8-LM's levels, baselines, and other published recipes.

bf16      GEMMs in BF16, fp32 states.
te        GEMMs in FP8, everything else as in BF16 training: TransformerEngine with current
          scaling, one scale per tensor. Here, as in all of these, a scale is a power of two.
o1 to o3  The levels of FP8-LM (arXiv 2310.18313, section 2 and Table 6). Different: the master is
          rounded stochastically; gradients of data-parallel ranks are added up in fp32, where the
          paper adds in FP8 with automatic scaling (precision.grad_reduce=fp8_sum); activations
          are in FP8 between pipeline stages, too.
o3_long   o3 for many micro-batches a step, of which a running sum in E4M3 loses the small ones:
          it adds gradients up in E2M5 (see `fp8lm.numerics.formats`).
o4        o3 with the second moment in eight bits too, as its root in E4M4: 2 + 4/d bytes per
          parameter over d data-parallel ranks.
te_delayed
          TransformerEngine's `DelayedScaling` with its defaults: the largest of 1024 amaxes, margin
          0, E4M3 forward and E5M2 backward; else as te. Where it differs is said in
          `fp8lm.layers.amax_history`.
coat      COAT (Xi et al., arXiv 2410.19313): both moments in eight bits, scales per tensor in the
          GEMMs, BF16 weights and gradients, fp32 master. Different: COAT expands the range of m and
          v in groups of 128 by a power k before E4M3; here v is its root (k = 1/2) in E4M4, rounded
          stochastically, m is E4M3 as it is, and each has one scale per tensor; activations outside
          of linear layers, which COAT saves in FP8, are BF16.
unit      Static scales after Unit Scaling (Blake et al., arXiv 2303.11257; Perez et al., arXiv
          2309.17224): powers of two from sizes alone, else as te. Where it differs is said in
          `fp8lm.layers.unit_scale`.
deepseek  DeepSeek-V3 (arXiv 2412.19437, 3.3): E4M3 throughout, scales per 1 x 128 of inputs and
          output gradients and per 128 x 128 of weights, moments in BF16, master and gradients
          in fp32. Different: scales are powers of two, not amax / 448; wgrad's inputs are cast
          from the BF16 tensor and not from its FP8 copy; inputs after attention are E4M3, not
          E5M6; nothing is sent in FP8 (there, the experts' dispatch is).
mxfp8     MXFP8 pretraining (Mishra et al., arXiv 2506.08027): E4M3 throughout, E8M0 scales per
          1 x 32, rounded so that no amax overflows, both orientations cast from the BF16
          tensor. Different: a scale is held in four bytes, though it is a number of E8M0.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

_FP8LM = Literal["bf16", "te", "o1", "o2", "o3", "o3_long", "o4"]
_OTHERS = Literal["te_delayed", "coat", "unit", "deepseek", "mxfp8"]
PresetName = Literal[_FP8LM, _OTHERS]
Formats = tuple[str, str, str]
_KINDS = ("input", "weight", "grad_output")


def _preset(
    gemm: str,
    params: str,
    main_params: str,
    main_grads: str,
    moments: tuple[str, str],
    rounding: str,
    wires: Formats,
    *,
    scaling: Formats = ("tensor", "tensor", "tensor"),
    method: str = "current",
    grad_output: str = "fp8_e5m2",
) -> Mapping[str, Any]:
    """`wires`: of activations, gradients, weights. `scaling`: of input, weight, grad_output."""
    exp_avg, exp_avg_sq = moments
    wire, grads_wire, params_wire = wires
    return MappingProxyType(
        {
            "gemm": gemm,
            "grad_output_format": grad_output,
            "params_dtype": params,
            "main_params_dtype": main_params,
            "main_grads_dtype": main_grads,
            "exp_avg_dtype": exp_avg,
            "exp_avg_sq_dtype": exp_avg_sq,
            "master_rounding": rounding,
            "first_last_layers_bf16": False,
            "scaling_method": method,
            "scaling": MappingProxyType(dict(zip(_KINDS, scaling, strict=True))),
            "wire": MappingProxyType(
                {"gather": wire, "reduce": wire, "grads": grads_wire}
                | {"params": params_wire, "pipeline": wire}
            ),
        }
    )


_FP32_STATES = ("fp32", "fp32")
_BF16_STATES = ("bf16", "bf16")
_FP8_STATES = ("fp8_e4m3", "fp16")
_FP8_MOMENTS = ("fp8_e4m3", "fp8_e4m4_root")
_BF16_WIRES = ("bf16", "fp32", "bf16")
# FP16 weights are sent in two bytes.
_FP8_WIRES = ("fp8", "fp8", "fp8")
_FP8_BUT_WEIGHTS = ("fp8", "fp8", "bf16")
_DEEPSEEK = ("block_1x128", "block_128x128", "block_1x128")
_MX = ("mx_1x32", "mx_1x32", "mx_1x32")

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
        "te_delayed": _preset(
            *("fp8", "bf16", "fp32", "fp32", _FP32_STATES, "nearest", _BF16_WIRES),
            method="delayed",
        ),
        "coat": _preset(
            *("fp8", "bf16", "fp32", "bf16", _FP8_MOMENTS, "nearest", ("bf16", "bf16", "bf16"))
        ),
        "unit": _preset(
            *("fp8", "bf16", "fp32", "fp32", _FP32_STATES, "nearest", _BF16_WIRES),
            method="static",
        ),
        "deepseek": _preset(
            *("fp8", "bf16", "fp32", "fp32", _BF16_STATES, "nearest", _BF16_WIRES),
            scaling=_DEEPSEEK,
            grad_output="fp8_e4m3",
        ),
        "mxfp8": _preset(
            *("fp8", "bf16", "fp32", "fp32", _FP32_STATES, "nearest", _BF16_WIRES),
            scaling=_MX,
            grad_output="fp8_e4m3",
        ),
    }
)
