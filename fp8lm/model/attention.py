"""Causal self-attention with grouped queries.

    softmax(q k^T / sqrt(D), causal) v

Shapes: S sequence, B micro-batch, H hidden, G query groups, N heads (N/G per group), D head size.
The fused projection keeps Megatron's row order, per group [q.. | k | v], so weights are
exchangeable with megatron-core's GPTModel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8lm.layers.linear import Linear
from fp8lm.layers.recipe import Recipe
from fp8lm.model.init import matrix_spec, normal_init, output_init
from fp8lm.model.rope import apply_rope


class SelfAttention(nn.Module):
    """Fused QKV projection, causal attention, output projection."""

    def __init__(self, config, recipe: Recipe, *, recompute_core: bool) -> None:  # noqa: ANN001
        super().__init__()
        self.num_groups = config.num_query_groups
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.head_size = config.kv_channels
        self.dropout = config.attention_dropout
        self.recompute_core = recompute_core
        self.kernels = recipe.kernels
        query_size = config.num_attention_heads * self.head_size
        qkv_size = query_size + 2 * self.num_groups * self.head_size
        std, layers = config.init_method_std, config.num_layers
        common = dict(
            precision=recipe.gemm,
            kernels=recipe.kernels,
            device=recipe.device,
            bias=not config.disable_bias_linear,
        )
        self.linear_qkv = Linear(
            matrix_spec(qkv_size, config.hidden_size, normal_init(std), recipe), **common
        )
        self.linear_proj = Linear(
            matrix_spec(config.hidden_size, query_size, output_init(std, layers), recipe), **common
        )

    def forward(self, x_SBH: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """[S,B,H] -> [S,B,H]; `rope` is (cos, sin) or None."""
        q_SBND, k_SBGD, v_SBGD = self._project(x_SBH)
        if rope is not None:
            q_SBND, k_SBGD = apply_rope(q_SBND, *rope), apply_rope(k_SBGD, *rope)
        if self.recompute_core and torch.is_grad_enabled():
            context = checkpoint(self._core, q_SBND, k_SBGD, v_SBGD, use_reentrant=False)
        else:
            context = self._core(q_SBND, k_SBGD, v_SBGD)
        return self.linear_proj(context)

    def _project(self, x_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, b, _ = x_SBH.shape
        per_group = (self.heads_per_group + 2, self.head_size)
        qkv = self.linear_qkv(x_SBH).view(s, b, self.num_groups, *per_group)
        q, k, v = qkv.split((self.heads_per_group, 1, 1), dim=3)
        return q.reshape(s, b, -1, self.head_size), k.squeeze(3), v.squeeze(3)

    def _core(self, q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor) -> Tensor:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (q_SBND, k_SBGD, v_SBGD))
        dropout = self.dropout if self.training else 0.0
        return self.kernels.attention(q, k, v, dropout).permute(2, 0, 1, 3).flatten(2)
