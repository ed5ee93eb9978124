"""FP8 linear layers in megatron-core's own transformer block."""

from __future__ import annotations

import contextlib
import re
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from fp8lm.config import PrecisionConfig
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.linear import Linear
from fp8lm.layers.recipe import Recipe
from fp8lm.model.init import matrix_spec, normal_init

pytestmark = pytest.mark.slow

SEQUENCE, BATCH, HIDDEN = 16, 2, 64


class CausalAttention(nn.Module):
    """Megatron's core attention asks for a GPU."""

    def __init__(self, config, *_, **__):
        super().__init__()
        self.kv = config.kv_channels

    def forward(self, query, key, value, *_, **__):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        context = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return context.permute(2, 0, 1, 3).flatten(2)


class Norm(nn.LayerNorm):
    """The same on a part of the sequence, which Megatron's norm for a CPU refuses."""

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__(hidden_size, eps)


@contextlib.contextmanager
def model_parallel(tp):
    """Megatron's groups, in a process alone or on the ranks of a pool."""
    from megatron.core import parallel_state

    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tp)
    try:
        # Its random states are a GPU's, and nothing here draws.
        with mock.patch("megatron.core.tensor_parallel.get_cuda_rng_tracker") as tracker:
            tracker.return_value.fork = contextlib.nullcontext
            yield
    finally:
        parallel_state.destroy_model_parallel()
        if alone:
            dist.destroy_process_group()


def block(precision, tp=1, sequence_parallel=False, **keys):
    """A transformer block of megatron-core; its own linear layers without `precision`."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlock

    from fp8lm.megatron import fp8_layer_spec

    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=128,
        gated_linear_unit=True,
        activation_func=functional.silu,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **keys,
    )
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    torch.manual_seed(1)
    if precision is not None:
        spec = fp8_layer_spec(spec, precision)
    return TransformerBlock(config, spec, post_layer_norm=False)


def train(precision, steps, tp=1, sequence_parallel=False):
    """Losses of steps that teach the block a function, and the first gradient of a weight."""
    generator = torch.Generator().manual_seed(2)
    x, wanted = (torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator) for _ in range(2))
    mine = slice(None)
    if sequence_parallel:
        size = SEQUENCE // tp
        mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    losses = []
    with model_parallel(tp):
        model = block(precision, tp, sequence_parallel)
        adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            y = model(x[mine].clone().requires_grad_(), attention_mask=None)
            loss = (y - wanted[mine]).square().sum() / wanted.numel()
            adam.zero_grad()
            loss.backward()
            total = loss.detach().clone()
            if sequence_parallel:
                dist.all_reduce(total)
                for name, parameter in model.named_parameters():  # as Megatron's finalizing does
                    if "layernorm" in name or getattr(parameter, "sequence_parallel", False):
                        dist.all_reduce(parameter.grad)
            losses.append(total.item())
            adam.step()
    return losses


def test_a_block_trains_as_with_megatrons_own_layers():
    own, fp8 = train(None, 20), train({"preset": "te"}, 20)
    assert own[-1] < 0.2 * own[0]
    # E4M3 and E5M2 are some per cent of noise in outputs and gradients.
    assert fp8 == pytest.approx(own, abs=0.01 * own[0]) and fp8 != own


@pytest.mark.parametrize(("preset", "sequence_parallel"), [("te", False), ("o3", True)])
def test_tensor_parallel(run_distributed, preset, sequence_parallel):
    """One scale for a tensor that is cut; o3 sends FP8 between ranks."""
    alone = train({"preset": preset}, 5)
    results = run_distributed(train, 2, {"preset": preset}, 5, 2, sequence_parallel)
    assert results[0] == results[1] == pytest.approx(alone, rel=0.02)


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_gemms_are_those_of_a_layer_here(scaling):
    """Output and both gradients, bit for bit."""
    precision = {"preset": "te", "scaling": {"input": scaling, "grad_output": scaling}}
    section = PrecisionConfig.model_validate(precision)
    recipe = Recipe.from_config(section, ReferenceKernels(), torch.device("cpu"))
    with model_parallel(1):
        model = block(precision, add_bias_linear=False, params_dtype=torch.bfloat16)
        theirs = model.layers[1].mlp.linear_fc1
        ours = Linear(matrix_spec(256, HIDDEN, normal_init(0.1), recipe), recipe)
        ours.weight.payload.copy_(theirs.weight)
        results = []
        for layer in (theirs, ours):
            x = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=torch.Generator().manual_seed(3))
            x = x.bfloat16().requires_grad_()
            y = layer(x)
            y = y[0] if isinstance(y, tuple) else y
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).bfloat16())
            results.append((y, x.grad))
    for own, other in zip(*results, strict=True):
        assert torch.equal(own, other)
    kernels = ReferenceKernels()
    gradient = kernels.dequantize(ours.weight.main_grad.value)
    assert torch.equal(theirs.weight.grad.float(), gradient.to(torch.bfloat16).float())


def test_checkpoints_are_megatrons():
    """The same parameters and sharded state as of its own layers."""
    with model_parallel(1):
        own, fp8 = block(None), block({"preset": "te"})
        metadata = {"dp_cp_group": dist.group.WORLD}
        states = [model.sharded_state_dict(metadata=metadata) for model in (own, fp8)]
    assert states[0].keys() == states[1].keys()
    fp8.load_state_dict(own.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), fp8.parameters(), strict=True))


def test_what_is_no_recipe_of_these_layers():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec

    from fp8lm.megatron import fp8_layer_spec

    spec = get_gpt_layer_local_spec()
    for precision in ({"preset": "bf16"}, {"preset": "te_delayed"}):
        with pytest.raises(ValueError, match="current or static scaling"):
            fp8_layer_spec(spec, precision)
    with pytest.raises(ValueError, match="no ColumnParallelLinear"):
        fp8_layer_spec(ModuleSpec(module=nn.Linear))
    with model_parallel(1):
        layer = block({"preset": "te"}).layers[0].mlp.linear_fc1
        with pytest.raises(ValueError, match="no experts"):
            layer(torch.zeros(SEQUENCE, BATCH, HIDDEN), weight=layer.weight)


def test_the_lines_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "user-guide" / "migration.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(code, names)
    for spec in (names["spec"], names["with_fp8_wires"]):
        mlp = spec.submodules.mlp  # since megatron-core 0.18 a partial function
        mlp = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
        modules = mlp, spec.submodules.self_attention.submodules
        linears = [modules[0].linear_fc1, modules[0].linear_fc2]
        linears += [modules[1].linear_qkv, modules[1].linear_proj]
        assert all(linear.module.__name__.startswith("Fp8") for linear in linears)
    assert linears[0].params["precision"].wire.gather == "fp8"
