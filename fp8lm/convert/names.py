"""Which rows of which parameter a HuggingFace tensor is.

    here                          [q.. | k | v] per query group, [gate | up]; [out, in]
    llama, mistral, qwen          q_proj, k_proj, v_proj, gate_proj, up_proj apart
    gpt_neox                      query_key_value [q | k | v] per head: the same as here
    gpt2                          c_attn [all q | all k | all v]; [in, out], transposed

A `NamedRows` is such a tensor: ranges of rows of one parameter, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fp8lm.config import ModelConfig

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class NamedRows:
    """`name` there holds the rows `ranges` of `param` here; `transposed`: as [columns, rows]."""

    name: str
    param: str
    ranges: Ranges
    transposed: bool = False

    @property
    def num_rows(self) -> int:
        """Number of rows of all ranges."""
        return sum(stop - start for start, stop in self.ranges)


def param_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of `model`, by Megatron's names; `vocab_size` rows of tokens."""
    hidden = model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocab_size, hidden)}
    if model.position_embedding_type == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (model.max_position_embeddings, hidden)
    for number in range(model.num_layers):
        for name, shape in _layer_shapes(model).items():
            shapes[f"decoder.layers.{number}.{name}"] = shape
    shapes |= _norm_shapes(model, "decoder.final_layernorm", hidden)
    if model.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (vocab_size, hidden)
    return shapes


def _layer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, ffn, query = model.hidden_size, model.ffn_hidden_size, model.query_projection_size
    matrices = {
        "self_attention.linear_qkv": (query + 2 * model.kv_projection_size, hidden),
        "self_attention.linear_proj": (hidden, query),
        "mlp.linear_fc1": (2 * ffn if model.swiglu else ffn, hidden),
        "mlp.linear_fc2": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= _norm_shapes(model, "input_layernorm", hidden)
    for name, shape in matrices.items():
        shapes[f"{name}.weight"] = shape
        if not model.disable_bias_linear or (model.add_qkv_bias and name.endswith("qkv")):
            shapes[f"{name}.bias"] = shape[:1]
        if name.endswith("qkv") and model.qk_layernorm:
            for norm in ("q_layernorm", "k_layernorm"):
                shapes |= _norm_shapes(model, f"self_attention.{norm}", model.kv_channels)
    return shapes | _norm_shapes(model, "pre_mlp_layernorm", hidden)


def _norm_shapes(model: ModelConfig, name: str, size: int) -> dict[str, tuple[int, ...]]:
    fields = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    return {f"{name}.{field}": (size,) for field in fields}


def hugging_face_names(
    model: ModelConfig, kind: str, shapes: dict[str, tuple[int, ...]]
) -> list[NamedRows]:
    """All tensors of an architecture, in the order of the parameters `shapes`."""
    return [
        named for param, shape in shapes.items() for named in _named(model, kind, param, shape[0])
    ]


_OUTSIDE = {
    "llama": {
        "embedding.word_embeddings": "model.embed_tokens",
        "decoder.final_layernorm": "model.norm",
        "output_layer": "lm_head",
    },
    "gpt_neox": {
        "embedding.word_embeddings": "gpt_neox.embed_in",
        "decoder.final_layernorm": "gpt_neox.final_layer_norm",
        "output_layer": "embed_out",
    },
    "gpt2": {
        "embedding.word_embeddings": "transformer.wte",
        "embedding.position_embeddings": "transformer.wpe",
        "decoder.final_layernorm": "transformer.ln_f",
        "output_layer": "lm_head",
    },
}
_LAYERS = {"llama": "model.layers", "gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}
# Modules whose tensors are those here, row by row.
_SAME_ROWS = {
    "llama": {
        "input_layernorm": "input_layernorm",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_fc2": "mlp.down_proj",
    },
    "gpt_neox": {
        "input_layernorm": "input_layernorm",
        "self_attention.linear_qkv": "attention.query_key_value",
        "self_attention.linear_proj": "attention.dense",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
    },
    "gpt2": {
        "input_layernorm": "ln_1",
        "self_attention.linear_proj": "attn.c_proj",
        "pre_mlp_layernorm": "ln_2",
        "mlp.linear_fc1": "mlp.c_fc",
        "mlp.linear_fc2": "mlp.c_proj",
    },
}


def family_of(kind: str) -> str:
    """The naming that an architecture has: llama, gpt_neox or gpt2."""
    return kind if kind in _LAYERS else "llama"


def head_of(kind: str) -> str:
    """The module of the output matrix."""
    return _OUTSIDE[family_of(kind)]["output_layer"]


def _named(model: ModelConfig, kind: str, param: str, rows: int) -> Iterator[NamedRows]:
    family, (module, _, field) = family_of(kind), param.rpartition(".")
    everything = ((0, rows),)
    if module in _OUTSIDE[family]:
        yield NamedRows(f"{_OUTSIDE[family][module]}.{field}", param, everything)
        return
    number, _, inner = module.removeprefix("decoder.layers.").partition(".")
    layer = f"{_LAYERS[family]}.{number}"
    transposed = family == "gpt2" and field == "weight" and "linear" in inner
    if inner in _SAME_ROWS[family]:
        yield NamedRows(
            f"{layer}.{_SAME_ROWS[family][inner]}.{field}", param, everything, transposed
        )
    elif family == "gpt2":
        q, k, v = qkv_ranges(model)
        yield NamedRows(f"{layer}.attn.c_attn.{field}", param, q + k + v, transposed)
    elif inner == "self_attention.linear_qkv":
        for name, ranges in zip("qkv", qkv_ranges(model), strict=True):
            yield NamedRows(f"{layer}.self_attn.{name}_proj.{field}", param, ranges)
    else:
        ffn = rows // 2
        for name, ranges in (("gate", ((0, ffn),)), ("up", ((ffn, rows),))):
            yield NamedRows(f"{layer}.mlp.{name}_proj.{field}", param, ranges)


def qkv_ranges(model: ModelConfig) -> tuple[Ranges, Ranges, Ranges]:
    """Rows of the fused projection that are queries, keys and values, group by group."""
    size = model.kv_channels
    queries = size * model.num_attention_heads // model.num_query_groups
    starts = range(0, model.num_query_groups * (queries + 2 * size), queries + 2 * size)
    return (
        tuple((start, start + queries) for start in starts),
        tuple((start + queries, start + queries + size) for start in starts),
        tuple((start + queries + size, start + queries + 2 * size) for start in starts),
    )
