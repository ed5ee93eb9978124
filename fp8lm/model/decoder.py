"""The transformer layers, each pre-norm.

    h = x + attn(norm(x))    y = h + mlp(norm(h))
    with parallel residual   y = x + attn(norm(x)) + mlp(norm'(x))

Recomputation in backward is of a whole layer (here) or of its attention core (see `SelfAttention`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8lm.config import ModelConfig
from fp8lm.kernels.attention import DocumentMask
from fp8lm.layers.dropout import DropoutNoise, dropout
from fp8lm.layers.recipe import Recipe
from fp8lm.model.attention import CoreAttention, SelfAttention
from fp8lm.model.mlp import MLP
from fp8lm.model.norms import hidden_norm


class TransformerLayer(nn.Module):
    """[S,B,H] -> [S,B,H]."""

    def __init__(self, config: ModelConfig, recipe: Recipe, *, recompute_core: bool) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.parallel_residual = config.use_parallel_residual
        self.input_layernorm = hidden_norm(config, recipe)
        self.self_attention = SelfAttention(config, recipe, recompute_core=recompute_core)
        self.pre_mlp_layernorm = hidden_norm(config, recipe)
        self.mlp = MLP(config, recipe)

    def forward(
        self,
        x_SBH: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        noise: DropoutNoise | None = None,
        core: CoreAttention | None = None,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        """[S,B,H] -> [S,B,H]; `rope` is (cos, sin) or None, `noise` None means no dropout.

        `core`, `mask`: see `SelfAttention`.
        """
        first, second = (None, None) if noise is None else (noise.at(0), noise.at(1))
        attended, x_SBH = self.self_attention(x_SBH, rope, self.input_layernorm, core, mask)
        if self.parallel_residual:
            read, x_SBH = self.mlp(x_SBH, self.pre_mlp_layernorm)
            h = x_SBH + dropout(attended, self.dropout, first)
        else:
            h = x_SBH + dropout(attended, self.dropout, first)
            read, h = self.mlp(h, self.pre_mlp_layernorm)
        return h + dropout(read, self.dropout, second)


@dataclass(frozen=True)
class StageSpec:
    """The part of the model that a pipeline stage holds: its layers, embedding and head."""

    layers: range
    has_embedding: bool = True
    has_head: bool = True


class Decoder(nn.Module):
    """The transformer layers of `part`, by their number in the model, and the final norm."""

    def __init__(
        self, config: ModelConfig, recipe: Recipe, recompute: str | None, part: StageSpec
    ) -> None:
        super().__init__()
        self.recompute_layers = recompute == "full"
        self.draws = config.attention_dropout > 0.0  # from a random state, as nothing else does
        self.layers = nn.ModuleDict(
            {
                str(index): TransformerLayer(
                    config,
                    recipe.for_layer(index, config.num_layers),
                    recompute_core=recompute == "selective",
                )
                for index in part.layers
            }
        )
        self.final_layernorm = hidden_norm(config, recipe) if part.has_head else None

    def forward(
        self,
        h_SBH: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        noise: DropoutNoise | None = None,
        core_of: Callable[[int], CoreAttention] | None = None,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        """[S,B,H] -> [S,B,H]; `core_of` gives the core attention of a layer by its number.

        `mask` is of the micro-batch, the same for all layers, also where they are recomputed.
        """
        for index, layer in self.layers.items():
            core = None if core_of is None else core_of(int(index))
            of_layer = None if noise is None else noise.at(int(index))
            if self.recompute_layers and torch.is_grad_enabled():
                h_SBH = checkpoint(
                    layer,
                    h_SBH,
                    rope,
                    of_layer,
                    None,
                    mask,
                    use_reentrant=False,
                    preserve_rng_state=self.draws,
                )
            else:
                h_SBH = layer(h_SBH, rope, of_layer, core, mask)
        return h_SBH if self.final_layernorm is None else self.final_layernorm(h_SBH)
