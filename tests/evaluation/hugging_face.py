"""A Llama-shaped model as `transformers` has it, with the same fp32 weights."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fp8lm.layers.param import named_params


def as_transformers(model):
    """The equivalent `LlamaForCausalLM` of an `InferenceModel`."""
    shape = model.config.model
    weights = {
        name: model.kernels.dequantize(weight.model_param)
        for name, weight in named_params(model.part).items()
    }
    rows = len(weights["output_layer.weight"])
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            head_dim=shape.kv_channels,
            max_position_embeddings=shape.max_position_embeddings,
            rms_norm_eps=shape.norm_epsilon,
            rope_theta=float(shape.rotary_base),
            tie_word_embeddings=False,
            attention_bias=False,
            bos_token_id=None,
            eos_token_id=model.tokenizer.eod,
        )
    )
    renamed = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    for index in range(shape.num_layers):
        renamed |= _layer(weights, index, shape)
    other.load_state_dict(renamed)
    return other.float().eval()


def _layer(weights, index, shape):
    of, to = f"decoder.layers.{index}.", f"model.layers.{index}."
    groups, head = shape.num_query_groups, shape.kv_channels
    queries = shape.num_attention_heads // groups
    qkv = weights[of + "self_attention.linear_qkv.weight"].view(groups, queries + 2, head, -1)
    gate, up = weights[of + "mlp.linear_fc1.weight"].chunk(2)
    return {
        to + "input_layernorm.weight": weights[of + "input_layernorm.weight"],
        to + "post_attention_layernorm.weight": weights[of + "pre_mlp_layernorm.weight"],
        to + "self_attn.q_proj.weight": qkv[:, :queries].flatten(0, 2),
        to + "self_attn.k_proj.weight": qkv[:, queries].flatten(0, 1),
        to + "self_attn.v_proj.weight": qkv[:, queries + 1].flatten(0, 1),
        to + "self_attn.o_proj.weight": weights[of + "self_attention.linear_proj.weight"],
        to + "mlp.gate_proj.weight": gate,
        to + "mlp.up_proj.weight": up,
        to + "mlp.down_proj.weight": weights[of + "mlp.linear_fc2.weight"],
    }


def agrees(model, other, tokens):
    """Whether both give the same logits for a row of `tokens`, to fp32 rounding."""
    ids = torch.tensor([tokens])
    torch.testing.assert_close(model.part(ids)[:, 0], other(ids).logits[0], rtol=1e-4, atol=1e-4)
