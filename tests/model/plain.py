"""The same GPT in plain PyTorch: one function of a dict of weights, head by head, [B,S,H]."""

from __future__ import annotations

import math

import torch


def rotate(x_BSD, positions_S, base, percent):
    """Rotary embedding as a product of complex numbers; pairs are halves apart."""
    size = x_BSD.shape[-1]
    pairs = int(size * percent) // 2
    z = torch.complex(x_BSD[..., :pairs], x_BSD[..., pairs : 2 * pairs])
    frequency = torch.tensor([base ** (-j / pairs) for j in range(pairs)], dtype=x_BSD.dtype)
    angle = positions_S[:, None] * frequency
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag, x_BSD[..., 2 * pairs :]), dim=-1)


def affine(x, w, name):
    y = x @ w[f"{name}.weight"].t()
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(x, w, name, config):
    if config.normalization == "LayerNorm":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + config.norm_epsilon).sqrt()
    x = x * w[f"{name}.weight"]
    return x + w[f"{name}.bias"] if config.normalization == "LayerNorm" else x


def head_norm(x, w, name, config):
    return norm(x, w, name, config) if config.qk_layernorm else x


def attention(x, w, name, config, positions):
    """One head after the other, each with a copy of its group's key and value."""
    size = config.kv_channels
    heads = config.num_attention_heads // config.num_query_groups  # of a group
    chunks = affine(x, w, f"{name}.linear_qkv").split(size, dim=-1)
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    contexts = []
    for group in range(config.num_query_groups):
        *queries, key, value = chunks[group * (heads + 2) :][: heads + 2]
        key = head_norm(key, w, f"{name}.k_layernorm", config)
        for query in queries:
            query = head_norm(query, w, f"{name}.q_layernorm", config)
            if config.position_embedding_type == "rope":
                turn = (positions, config.rotary_base, config.rotary_percent)
                query, turned = rotate(query, *turn), rotate(key, *turn)
            else:
                turned = key
            scores = query @ turned.transpose(1, 2) / math.sqrt(size)
            contexts.append(scores.masked_fill(future, -math.inf).softmax(dim=-1) @ value)
    return affine(torch.cat(contexts, dim=-1), w, f"{name}.linear_proj")


def mlp(x, w, name, config):
    inner = affine(x, w, f"{name}.linear_fc1")
    if config.swiglu:
        gate, up = inner[..., : config.ffn_hidden_size], inner[..., config.ffn_hidden_size :]
        inner = gate * torch.sigmoid(gate) * up
    elif config.gelu_approximate == "none":
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
    else:
        cubic = inner + 0.044715 * inner**3
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * cubic))
    return affine(inner, w, f"{name}.linear_fc2")


def logits(tokens_BS, w, config, positions_S=None):
    """[B,S] -> [B,S,V]."""
    if positions_S is None:
        positions_S = torch.arange(tokens_BS.shape[1])
    table = w["embedding.word_embeddings.weight"]
    h = table[tokens_BS]
    if config.position_embedding_type == "learned_absolute":
        h = h + w["embedding.position_embeddings.weight"][positions_S]
    for index in range(config.num_layers):
        layer = f"decoder.layers.{index}"
        attended = norm(h, w, f"{layer}.input_layernorm", config)
        attended = attention(attended, w, f"{layer}.self_attention", config, positions_S)
        read = h if config.use_parallel_residual else h + attended
        inner = mlp(norm(read, w, f"{layer}.pre_mlp_layernorm", config), w, f"{layer}.mlp", config)
        h = h + attended + inner
    h = norm(h, w, "decoder.final_layernorm", config)
    return h @ w.get("output_layer.weight", table).t()


def loss(logits_BSV, labels_BS, mask_BS):
    """Mean negative log-likelihood of the tokens that the mask keeps."""
    log_probability = logits_BSV.log_softmax(dim=-1)
    losses = -log_probability.gather(-1, labels_BS[..., None])[..., 0]
    return (losses * mask_BS).sum() / mask_BS.sum()
