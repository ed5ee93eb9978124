"""Megatron-core's names of parameters, where they are not those here.

decoder.layers.self_attention.linear_qkv.weight               of all layers, stacked
decoder.layers.self_attention.linear_qkv.layer_norm_weight    the input norm
decoder.layers.mlp.linear_fc1.layer_norm_weight               that before the MLP
"""

from __future__ import annotations

LAYERS = "decoder.layers."
_NORMS = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm_",
}


def key_of(param: str) -> tuple[str, int | None]:
    """Megatron's key of a parameter, and its layer's place in that tensor."""
    if not param.startswith(LAYERS):
        return param, None
    number, _, inner = param.removeprefix(LAYERS).partition(".")
    module, _, field = inner.rpartition(".")
    inner = f"{_NORMS[module]}{field}" if module in _NORMS else inner
    return LAYERS + inner, int(number)
