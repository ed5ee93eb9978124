"""The feed-forward block: `fc2(gelu(fc1(x)))` or, gated, `fc2(silu(gate) * up)`.

The gated first matrix keeps Megatron's row order [gate | up].
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fp8lm.layers.linear import Linear
from fp8lm.layers.recipe import Recipe
from fp8lm.model.init import matrix_spec, normal_init, output_init


class MLP(nn.Module):
    """[S,B,H] -> [S,B,H] through `ffn_hidden_size` features."""

    def __init__(self, config, recipe: Recipe) -> None:  # noqa: ANN001
        super().__init__()
        self.swiglu = config.swiglu
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        std, layers = config.init_method_std, config.num_layers
        common = dict(
            precision=recipe.gemm,
            kernels=recipe.kernels,
            device=recipe.device,
            bias=not config.disable_bias_linear,
        )
        fc1_size = 2 * ffn if config.swiglu else ffn
        self.linear_fc1 = Linear(matrix_spec(fc1_size, hidden, normal_init(std), recipe), **common)
        self.linear_fc2 = Linear(
            matrix_spec(hidden, ffn, output_init(std, layers), recipe), **common
        )

    def forward(self, x_SBH: Tensor) -> Tensor:
        """[S,B,H] -> [S,B,H]."""
        inner = self.linear_fc1(x_SBH)
        if self.swiglu:
            gate, up = inner.chunk(2, dim=-1)
            return self.linear_fc2(functional.silu(gate) * up)
        return self.linear_fc2(functional.gelu(inner, approximate="tanh"))
