"""The feed-forward block: `fc2(gelu(fc1(x)))` or, gated, `fc2(silu(gate) * up)`.

The gated first matrix keeps Megatron's row order [gate | up].
"""

from __future__ import annotations

from torch import Tensor, nn

from fp8lm.config import ModelConfig
from fp8lm.layers.activation import Gelu, SwiGlu
from fp8lm.layers.prologue import Prologue
from fp8lm.layers.recipe import Recipe
from fp8lm.model.init import normal_init, output_init
from fp8lm.model.parallel_linear import column_linear, row_linear


class MLP(nn.Module):
    """[S,B,H] -> [S,B,H] through `ffn_hidden_size` features, this rank's part of them."""

    def __init__(self, config: ModelConfig, recipe: Recipe) -> None:
        super().__init__()
        self.activation: Prologue = Gelu(recipe.kernels, config.gelu_approximate)
        if config.swiglu:
            self.activation = SwiGlu(recipe.kernels)
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        std, layers = config.init_method_std, config.num_layers
        bias, num_sections = not config.disable_bias_linear, 2 if config.swiglu else 1
        self.linear_fc1 = column_linear(
            num_sections * ffn,
            hidden,
            normal_init(std),
            recipe,
            bias=bias,
            num_sections=num_sections,
        )
        self.linear_fc2 = row_linear(
            hidden,
            ffn,
            output_init(std, layers),
            recipe,
            bias=bias,
            smooth=recipe.smooth_swiglu,
        )

    def forward(self, x_SBH: Tensor, norm: Prologue | None = None) -> tuple[Tensor, Tensor]:
        """[S,B,H] -> [S,B,H], and the input for the residual path (see `Linear.with_residual`).

        `norm` is applied to the input.
        """
        hidden, x_SBH = self.linear_fc1.with_residual(x_SBH, norm)
        return self.linear_fc2(hidden, self.activation), x_SBH
