"""One pre-norm transformer layer: `h = x + attn(norm(x)); y = h + mlp(norm(h))`."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from fp8lm.config import ModelConfig
from fp8lm.layers.dropout import DropoutNoise, dropout
from fp8lm.layers.norm import NORMS
from fp8lm.layers.recipe import Recipe
from fp8lm.model.attention import SelfAttention
from fp8lm.model.mlp import MLP


class TransformerLayer(nn.Module):
    """[S,B,H] -> [S,B,H]."""

    def __init__(self, config: ModelConfig, recipe: Recipe, *, recompute_core: bool) -> None:
        super().__init__()
        make_norm = partial(
            NORMS[config.normalization],
            config.hidden_size,
            config.norm_epsilon,
            recipe.high_precision,
            recipe.kernels,
            recipe.device,
            sequence_parallel=recipe.tp.sequence_parallel,
        )
        self.dropout = config.hidden_dropout
        self.input_layernorm = make_norm()
        self.self_attention = SelfAttention(config, recipe, recompute_core=recompute_core)
        self.pre_mlp_layernorm = make_norm()
        self.mlp = MLP(config, recipe)

    def forward(
        self,
        x_SBH: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        noise: DropoutNoise | None = None,
    ) -> Tensor:
        """[S,B,H] -> [S,B,H]; `rope` is (cos, sin) or None, `noise` None means no dropout."""
        first, second = (None, None) if noise is None else (noise.at(0), noise.at(1))
        attended = self.self_attention(x_SBH, rope, self.input_layernorm)
        h = x_SBH + dropout(attended, self.dropout, first)
        return h + dropout(self.mlp(h, self.pre_mlp_layernorm), self.dropout, second)
