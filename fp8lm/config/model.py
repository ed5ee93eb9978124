"""Section `model`: the shape of the network, in Megatron's words."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fp8lm.config.section import Bool, Count, Positive, PositiveShare, Section, Share, derived


def _ffn_hidden_size(model: dict[str, Any]) -> int:
    hidden = model["hidden_size"]
    # SwiGLU has a third matrix: two thirds of 4h keep the parameter count, rounded down to 64.
    return max(64, int(8 * hidden / 3 / 64) * 64) if model["swiglu"] else 4 * hidden


class ModelConfig(Section):
    """Shape of the network; sizes in elements, sequence lengths in tokens."""

    num_layers: Count = Field(description="Number of transformer layers.")
    hidden_size: Count = Field(description="Width of the residual stream.")
    num_attention_heads: Count = Field(description="Number of query heads.")
    seq_length: Count = Field(description="Tokens in a training sample.")
    swiglu: Bool = Field(False, description="Gated SiLU in the MLP instead of GELU.")
    gelu_approximate: Literal["tanh", "none"] = Field(
        "tanh",
        description="GELU by its tanh approximation, or none: by the error function, as GPT-NeoX.",
    )
    ffn_hidden_size: Count = derived(
        _ffn_hidden_size,
        "4 * hidden_size, with swiglu 8/3 * hidden_size rounded down to a multiple of 64",
        "Width of the MLP between its two projections.",
    )
    num_query_groups: Count = derived(
        lambda model: model["num_attention_heads"],
        "num_attention_heads",
        "Number of key and value heads (grouped-query attention).",
    )
    kv_channels: Count = derived(
        lambda model: max(1, model["hidden_size"] // model["num_attention_heads"]),
        "hidden_size / num_attention_heads",
        "Width of one attention head.",
    )
    max_position_embeddings: Count = derived(
        lambda model: model["seq_length"],
        "seq_length",
        "Longest sequence the positions reach.",
    )
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = Field(
        "rope", description="How a token knows its position."
    )
    rotary_base: Positive = Field(10000.0, description="Base of RoPE's wavelengths.")
    rotary_percent: PositiveShare = Field(
        1.0, description="Share of a head's channels that RoPE rotates."
    )
    use_rope_scaling: Bool = Field(
        False,
        description="Llama 3.1's scaling of RoPE: wavelengths that do not fit into 8192 tokens are "
        "stretched by rope_scaling_factor, those below 2048 are kept.",
    )
    rope_scaling_factor: Positive = Field(
        8.0, description="How many times longer, with use_rope_scaling."
    )
    normalization: Literal["LayerNorm", "RMSNorm"] = Field(
        "LayerNorm", description="Norm before attention, before the MLP and before the head."
    )
    norm_epsilon: Positive = Field(1e-5, description="Added to the variance inside a norm.")
    untie_embeddings_and_output_weights: Bool = Field(
        False, description="Give the output head a matrix of its own."
    )
    disable_bias_linear: Bool = Field(False, description="Leave out the biases of linear layers.")
    add_qkv_bias: Bool = Field(
        False,
        description="Keep the bias of the QKV projection despite disable_bias_linear, as Qwen2.",
    )
    qk_layernorm: Bool = Field(
        False,
        description="A norm of each head's query and key before RoPE, with the weights of one "
        "head, as Qwen3.",
    )
    use_parallel_residual: Bool = Field(
        False,
        description="Attention and MLP read the same residual stream and are added to it together, "
        "as in GPT-NeoX and Pythia.",
    )
    init_method_std: Positive = Field(
        0.02,
        description="Standard deviation of initial weights; projections back into the residual "
        "stream take it divided by sqrt(2 * num_layers).",
    )
    hidden_dropout: Share = Field(
        0.0, description="Dropout on the embedding and on what is added to the residual stream."
    )
    attention_dropout: Share = Field(0.0, description="Dropout on attention probabilities.")
    make_vocab_size_divisible_by: Count = Field(
        128, description="The vocabulary is padded to a multiple of this."
    )

    @property
    def query_projection_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_projection_size(self) -> int:
        """Width of all key heads together, which is also that of the value heads."""
        return self.num_query_groups * self.kv_channels

    @property
    def layer_matrix_parameters(self) -> int:
        """Parameters of the matrices of one transformer layer."""
        q, k = self.query_projection_size, self.kv_projection_size
        mlp = (3 if self.swiglu else 2) * self.ffn_hidden_size
        return self.hidden_size * (q + 2 * k + q + mlp)
