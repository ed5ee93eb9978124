"""Causal self-attention with grouped queries.

    softmax(q k^T / sqrt(D), causal) v

With documents apart also block-diagonal: a token sees those of its own document up to itself.

With `qk_layernorm` q and k are each normalized over D first, before RoPE.

Shapes: S sequence, B micro-batch, H hidden, G query groups, N heads (N/G per group), D head size.
The fused projection keeps Megatron's row order, per group [q.. | k | v], so weights are
exchangeable with megatron-core's GPTModel. Split over ranks, each has whole groups or, with more
ranks than groups, gathers the one that it shares and takes its part of the queries; with sequence
parallelism what comes in and goes out is a part of the sequence, and the core sees all of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8lm.config import ModelConfig
from fp8lm.kernels.attention import DocumentMask
from fp8lm.layers.prologue import Prologue
from fp8lm.layers.recipe import Recipe
from fp8lm.model.init import normal_init, output_init
from fp8lm.model.norms import head_norm
from fp8lm.model.parallel_linear import column_linear, row_linear
from fp8lm.model.rope import rotated_heads

# q [S,B,N,D], k and v [S,B,G,D] -> the context [S,B,N*D] of this rank's heads.
CoreAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


class SelfAttention(nn.Module):
    """Fused QKV projection, causal attention, output projection."""

    def __init__(self, config: ModelConfig, recipe: Recipe, *, recompute_core: bool) -> None:
        super().__init__()
        self.tp = recipe.tp
        self.num_groups = max(1, config.num_query_groups // self.tp.size)
        self.ranks_per_group = max(1, self.tp.size // config.num_query_groups)
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.head_size = config.kv_channels
        self.dropout = config.attention_dropout
        self.recompute_core = recompute_core
        self.kernels = recipe.kernels
        query_size = config.num_attention_heads * self.head_size
        qkv_size = query_size + 2 * config.num_query_groups * self.head_size
        hidden, bias = config.hidden_size, not config.disable_bias_linear
        std, layers = config.init_method_std, config.num_layers
        self.linear_qkv = column_linear(
            qkv_size, hidden, normal_init(std), recipe, bias=bias or config.add_qkv_bias
        )
        self.q_layernorm = head_norm(config, recipe) if config.qk_layernorm else None
        self.k_layernorm = head_norm(config, recipe) if config.qk_layernorm else None
        self.linear_proj = row_linear(
            hidden, query_size, output_init(std, layers), recipe, bias=bias
        )

    def forward(
        self,
        x_SBH: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        norm: Prologue | None = None,
        core: CoreAttention | None = None,
        mask: DocumentMask | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[S,B,H] -> [S,B,H], and the input for the residual path (see `Linear.with_residual`).

        `rope` is (cos, sin) or None, `norm` is applied to the input. `core` takes the place of
        causal attention within the sequence; `mask` keeps the latter within documents.
        """
        qkv, x_SBH = self.linear_qkv.with_residual(x_SBH, norm)
        q_SBND, k_SBGD, v_SBGD = self._heads(self._projected(qkv), rope)
        if core is not None:
            context = core(q_SBND, k_SBGD, v_SBGD)
        elif self.recompute_core and torch.is_grad_enabled():
            # A random state is saved and restored, which takes time on the host.
            draws = self.dropout > 0.0
            context = checkpoint(
                self._core,
                q_SBND,
                k_SBGD,
                v_SBGD,
                mask,
                use_reentrant=False,
                preserve_rng_state=draws,
            )
        else:
            context = self._core(q_SBND, k_SBGD, v_SBGD, mask)
        return self.linear_proj(context), x_SBH

    def _projected(self, qkv: Tensor) -> Tensor:
        """Per group its query heads, its key and its value: [S,B,G,N/G+2,D]."""
        if self.ranks_per_group > 1:
            qkv = self.tp.gather_query_group(qkv)
        qkv = qkv.unflatten(2, (self.num_groups, self.heads_per_group + 2, self.head_size))
        if self.q_layernorm is None or self.k_layernorm is None:
            return qkv
        q, k, v = qkv.split((self.heads_per_group, 1, 1), dim=3)
        return torch.cat((self.q_layernorm(q), self.k_layernorm(k), v), dim=3)

    def _heads(
        self, qkv_SBGHD: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's queries [S,B,N,D], keys and values [S,B,G,D]."""
        count = self.heads_per_group // self.ranks_per_group
        first = count * (self.tp.rank % self.ranks_per_group)
        queries = slice(first, first + count)
        if rope is not None:
            return rotated_heads(qkv_SBGHD, rope, queries, self.kernels)
        q, k, v = qkv_SBGHD.split((self.heads_per_group, 1, 1), dim=3)
        return q[..., queries, :].flatten(2, 3), k.squeeze(3), v.squeeze(3)

    def _core(
        self, q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, mask: DocumentMask | None
    ) -> Tensor:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (q_SBND, k_SBGD, v_SBGD))
        dropout = self.dropout if self.training else 0.0
        return self.kernels.attention(q, k, v, dropout, mask).permute(2, 0, 1, 3).flatten(2)
