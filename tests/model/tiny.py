"""Tiny models of every shape, with random weights in place of the initial ones and zeros."""

from __future__ import annotations

import torch

from fp8lm.batch import Batch
from fp8lm.config import ModelConfig, PrecisionConfig
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.param import named_params, trainable
from fp8lm.layers.recipe import Recipe
from fp8lm.model import GPTModel
from fp8lm.model.init import initial_value
from fp8lm.model.objectives import LanguageModeling

KERNELS = ReferenceKernels()
CPU = torch.device("cpu")
VOCABULARY, SEQUENCE, BATCH = 64, 16, 2
FP32_KEYS = dict(preset="bf16", gemm="fp32", params_dtype="fp32", master_rounding="nearest")
SHAPES = {
    "gpt": {},
    "llama": dict(
        normalization="RMSNorm",
        swiglu=True,
        ffn_hidden_size=48,
        num_query_groups=2,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
    ),
    "learned": dict(
        position_embedding_type="learned_absolute", max_position_embeddings=24, num_query_groups=1
    ),
    "partial rope": dict(rotary_percent=0.5, rotary_base=500.0, kv_channels=16),
    "qwen": dict(
        normalization="RMSNorm",
        swiglu=True,
        ffn_hidden_size=48,
        num_query_groups=2,
        kv_channels=16,
        disable_bias_linear=True,
        add_qkv_bias=True,
        qk_layernorm=True,
    ),
    "neox": dict(
        rotary_percent=0.25,
        gelu_approximate="none",
        use_parallel_residual=True,
        untie_embeddings_and_output_weights=True,
    ),
    "untied": dict(position_embedding_type="none", untie_embeddings_and_output_weights=True),
}


def model_config(**keys):
    return ModelConfig(
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "seq_length": SEQUENCE,
            **keys,
        }
    )


def build(model=None, precision=None, *, recompute=None, kernels=KERNELS, seed=0):
    """A model of the config keys `model` and `precision`, all its weights random."""
    recipe = Recipe.from_config(PrecisionConfig(**(precision or FP32_KEYS)), kernels, CPU)
    gpt = GPTModel(model_config(**(model or {})), VOCABULARY, recipe, recompute)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in named_params(gpt).items():
        value = initial_value(name, weight.spec, seed)
        value = value * 5 if value.ndim == 2 else value  # so that attention is not uniform
        value = value + 0.1 * torch.randn(value.shape, generator=generator) * (value.ndim == 1)
        weight.model_param.copy_(KERNELS.quantize(value, weight.model_param.format))
    return gpt


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, SEQUENCE)
    return Batch(
        tokens=torch.randint(0, VOCABULARY, shape, generator=generator),
        labels=torch.randint(0, VOCABULARY, shape, generator=generator),
        loss_mask=(torch.rand(shape, generator=generator) < 0.8).float(),
        sample_ids=torch.arange(BATCH) + BATCH * seed,
    )


def loss_and_gradients(gpt, data):
    """Loss, and the accumulated gradient of every weight that is trained as a ScaledTensor."""
    weights = trainable(named_params(gpt))
    for weight in weights.values():
        weight.main_grad.zero()
    loss = LanguageModeling().loss(gpt.forward_step(None, data), data)
    loss.backward()
    for weight in weights.values():
        weight.main_grad.zero_if_unused()
    return loss.detach(), {name: weight.main_grad.value.clone() for name, weight in weights.items()}
