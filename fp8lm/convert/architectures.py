"""The keys of HuggingFace's config.json and those of section `model`, both ways.

    llama      RMSNorm, SwiGLU, RoPE; biases nowhere or everywhere       Llama, Mistral
    qwen2      the same with a bias on queries, keys and values
    qwen3      the same with a norm of each head's query and key
    gpt_neox   LayerNorm, GELU, RoPE, biases; attention and MLP parallel or not    GPT-NeoX, Pythia
    gpt2       LayerNorm, GELU, learned positions, biases

Names are those that transformers has read since its version 4, which vLLM reads, too. What one side
has and the other lacks is refused with the key that differs; sizes are passed on as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fp8lm.config import ModelConfig
from fp8lm.runtime.errors import InputError

Json = dict[str, Any]

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
# Llama 3.1's; the factor is free.
_ROPE_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def to_hugging_face(model: ModelConfig, vocab_size: int) -> Json:
    """config.json of `model`; `InputError` naming the key that no architecture there has."""
    kind = architecture_of(model)
    if kind == "gpt2":
        keys = _to_gpt2(model)
    elif kind == "gpt_neox":
        keys = _to_neox(model)
    else:
        keys = _to_llama_like(model, kind)
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "use_cache": True,
        **keys,
    }


def architecture_of(model: ModelConfig) -> str:
    """The `model_type` of `CLASSES` that computes what `model` does, else `InputError`."""
    if model.normalization == "RMSNorm":
        kind = "qwen3" if model.qk_layernorm else "qwen2" if _has_qkv_bias_alone(model) else "llama"
        wrong = _mistakes(
            model,
            swiglu=True,
            position_embedding_type="rope",
            rotary_percent=1.0,
            use_parallel_residual=False,
        )
        if kind == "qwen3":
            wrong += _mistakes(model, add_qkv_bias=False, disable_bias_linear=True)
    else:
        kind = "gpt2" if model.position_embedding_type == "learned_absolute" else "gpt_neox"
        wrong = _mistakes(
            model,
            swiglu=False,
            num_query_groups=model.num_attention_heads,
            kv_channels=model.hidden_size // model.num_attention_heads,
            disable_bias_linear=False,
            qk_layernorm=False,
            use_rope_scaling=False,
        )
        if kind == "gpt2":
            wrong += _mistakes(model, use_parallel_residual=False)
        else:
            wrong += _mistakes(model, position_embedding_type="rope")
    if wrong:
        raise InputError(
            f"no architecture of transformers that is known here has {wrong[0]}; the nearest, "
            f"{kind}, has {wrong[1]}"
        )
    return kind


def _mistakes(model: ModelConfig, **wanted: Any) -> list[str]:
    for key, value in wanted.items():
        if (own := getattr(model, key)) != value:
            return [f"model.{key} = {_text(own)}", f"{key} = {_text(value)}"]
    return []


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _has_qkv_bias_alone(model: ModelConfig) -> bool:
    return model.disable_bias_linear and model.add_qkv_bias


def _to_llama_like(model: ModelConfig, kind: str) -> Json:
    keys: Json = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
        "attention_dropout": model.attention_dropout,
    }
    if model.use_rope_scaling:
        factor = model.rope_scaling_factor
        keys["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **_ROPE_SCALING}
    if kind != "qwen2":  # which has its biases by its name
        keys["attention_bias"] = not model.disable_bias_linear
    if kind == "llama":
        keys["mlp_bias"] = not model.disable_bias_linear
    return keys


def _to_neox(model: ModelConfig) -> Json:
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": "gelu" if model.gelu_approximate == "none" else "gelu_pytorch_tanh",
        "max_position_embeddings": model.max_position_embeddings,
        "layer_norm_eps": model.norm_epsilon,
        "rotary_emb_base": model.rotary_base,
        "rotary_pct": model.rotary_percent,
        "use_parallel_residual": model.use_parallel_residual,
        "attention_bias": True,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
    }


def _to_gpt2(model: ModelConfig) -> Json:
    return {
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "activation_function": "gelu" if model.gelu_approximate == "none" else "gelu_new",
        "layer_norm_epsilon": model.norm_epsilon,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
    }


def from_hugging_face(config: Mapping[str, Any], source: str) -> Json:
    """Keys of section `model` for a config.json; `InputError` naming the key that is not here.

    `source` stands in messages.
    """
    kind = str(config.get("model_type"))
    if kind not in _READERS:
        raise InputError(
            f"{source}: model_type = {kind} is not an architecture that is known here: it is "
            f"none of {', '.join(_READERS)}"
        )
    reader = _ConfigReader(config, source)
    model = _READERS[kind](reader, kind)
    # Dropout is a choice of the training that reads the weights.
    return {
        **model,
        "seq_length": model["max_position_embeddings"],
        "untie_embeddings_and_output_weights": not reader.get(
            "tie_word_embeddings", kind == "gpt2"
        ),
    }


class _ConfigReader:
    """Reads a config.json: sizes that must be there, and switches that must be off."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config, self.source = config, source

    def get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; `default` where the key is absent, if that is not None."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise InputError(f"{self.source}: {key} = {value!r}: expected a positive whole number")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        return self.positive(key, self.get(key, default))

    def positive(self, key: str, value: Any) -> float:
        """`value` of `key` as a positive number."""
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise InputError(f"{self.source}: {key} = {value!r}: expected a positive number")
        return float(value)

    def expect(self, key: str, *wanted: Any) -> Any:
        """One of `wanted`, of which the first is the default."""
        value = self.get(key, wanted[0])
        if value not in wanted:
            self.refuse(key, value, f"only {' or '.join(map(repr, wanted))} is")
        return value

    def refuse(self, key: str, value: Any, what: str) -> None:
        raise InputError(f"{self.source}: {key} = {value!r} cannot be expressed here: {what}")

    def _object(self, key: str) -> Json:
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise InputError(f"{self.source}: {key} = {value!r}: expected an object")
        return value

    def rope(self) -> Json:
        """RoPE's parameters, of version 5's one dict or of version 4's single keys."""
        found = dict(self._object("rope_parameters"))
        for key, old in (
            ("rope_theta", "rotary_emb_base"),
            ("partial_rotary_factor", "rotary_pct"),
        ):
            for name in (key, old):
                if self.config.get(name) is not None:
                    found.setdefault(key, self.config[name])
        for key, value in self._object("rope_scaling").items():
            found["rope_type" if key == "type" else key] = value
        found.setdefault("rope_type", "default")
        return found


def _rope_keys(reader: _ConfigReader, base: float, percent: float) -> Json:
    found = reader.rope()
    share = reader.positive("partial_rotary_factor", found.get("partial_rotary_factor", percent))
    if share > 1:
        reader.refuse("partial_rotary_factor", share, "it is a share of a head's channels")
    keys: Json = {
        "position_embedding_type": "rope",
        "rotary_base": reader.positive("rope_theta", found.get("rope_theta", base)),
        "rotary_percent": share,
    }
    if (kind := found["rope_type"]) == "llama3":
        for key, value in _ROPE_SCALING.items():
            if found.get(key) != value:
                reader.refuse(f"rope_scaling.{key}", found.get(key), f"only {value} is")
        factor = reader.positive("rope_scaling.factor", found.get("factor"))
        return {**keys, "use_rope_scaling": True, "rope_scaling_factor": factor}
    if kind != "default":
        reader.refuse("rope_scaling.rope_type", kind, "only llama3 is")
    return keys


def _from_llama_like(reader: _ConfigReader, kind: str) -> Json:
    heads, hidden = reader.count("num_attention_heads"), reader.count("hidden_size")
    groups = reader.count("num_key_value_heads", heads)
    if heads % groups:
        reader.refuse("num_key_value_heads", groups, f"it does not divide {heads} heads")
    reader.expect("hidden_act", "silu")
    sliding = reader.config.get("sliding_window", 4096 if kind == "mistral" else None)
    slides = sliding is not None and reader.get("use_sliding_window", kind == "mistral")
    if slides and reader.count("sliding_window", 4096) < reader.count("max_position_embeddings"):
        reader.refuse("sliding_window", sliding, "attention reaches over all positions")
    kinds = reader.get("layer_types", ["full_attention"])
    if not isinstance(kinds, list) or any(own != "full_attention" for own in kinds):
        reader.refuse("layer_types", kinds, "all layers have full attention")
    return {
        "num_layers": reader.count("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": reader.count("head_dim", 128 if kind == "qwen3" else hidden // heads),
        "ffn_hidden_size": reader.count("intermediate_size"),
        "max_position_embeddings": reader.count("max_position_embeddings"),
        "normalization": "RMSNorm",
        "norm_epsilon": reader.number("rms_norm_eps", 1e-6),
        "swiglu": True,
        "qk_layernorm": kind == "qwen3",
        **_llama_biases(reader, kind),
        **_rope_keys(reader, 10000.0, 1.0),
    }


def _llama_biases(reader: _ConfigReader, kind: str) -> Json:
    if kind == "qwen2":
        return {"disable_bias_linear": True, "add_qkv_bias": True}
    if kind != "llama":
        reader.expect("attention_bias", False)
        return {"disable_bias_linear": True}
    attention = bool(reader.get("attention_bias", False))
    if bool(reader.get("mlp_bias", False)) != attention:
        reader.refuse("attention_bias", attention, "all linear layers have a bias, or none")
    return {"disable_bias_linear": not attention}


def _from_neox(reader: _ConfigReader, kind: str) -> Json:
    reader.expect("attention_bias", True)
    return {
        "num_layers": reader.count("num_hidden_layers"),
        "hidden_size": reader.count("hidden_size"),
        "num_attention_heads": reader.count("num_attention_heads"),
        "ffn_hidden_size": reader.count("intermediate_size"),
        "max_position_embeddings": reader.count("max_position_embeddings"),
        "norm_epsilon": reader.number("layer_norm_eps", 1e-5),
        "gelu_approximate": _gelu(reader, "hidden_act", "gelu"),
        "use_parallel_residual": bool(reader.get("use_parallel_residual", True)),
        **_rope_keys(reader, 10000.0, 0.25),
    }


def _from_gpt2(reader: _ConfigReader, kind: str) -> Json:
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        reader.expect(key, False)
    reader.expect("add_cross_attention", False)
    reader.expect("scale_attn_weights", True)
    hidden = reader.count("n_embd")
    return {
        "num_layers": reader.count("n_layer"),
        "hidden_size": hidden,
        "num_attention_heads": reader.count("n_head"),
        "ffn_hidden_size": reader.count("n_inner", 4 * hidden),
        "max_position_embeddings": reader.count("n_positions"),
        "position_embedding_type": "learned_absolute",
        "norm_epsilon": reader.number("layer_norm_epsilon", 1e-5),
        "gelu_approximate": _gelu(reader, "activation_function", "gelu_new"),
    }


def _gelu(reader: _ConfigReader, key: str, default: str) -> str:
    others = [name for name in ("gelu", *_TANH) if name != default]
    return "tanh" if reader.expect(key, default, *others) in _TANH else "none"


_READERS: Mapping[str, Callable[[_ConfigReader, str], Json]] = {
    **dict.fromkeys(LLAMA_LIKE, _from_llama_like),
    "gpt_neox": _from_neox,
    "gpt2": _from_gpt2,
}
