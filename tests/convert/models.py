"""Checkpoints of small models with random weights, as a training would have left them."""

from __future__ import annotations

import torch

from fp8lm.checkpoint import save_checkpoint
from fp8lm.comm.groups import process_groups
from fp8lm.config import build_config
from fp8lm.data.tokenizer import NullTokenizer
from fp8lm.kernels import ReferenceKernels
from fp8lm.training.builders import build_one_process
from fp8lm.training.provenance import made_with
from fp8lm.training.restore import restore_model
from fp8lm.training.state import by_name, model_shards, optimizer_shards

CPU, KERNELS = torch.device("cpu"), ReferenceKernels()
IDS, SEQUENCE, BATCH = 250, 32, 2  # the table has 256 rows
FP32 = {"preset": "bf16", "gemm": "fp32", "params_dtype": "fp32"}
LLAMA = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "ffn_hidden_size": 96,
    "num_query_groups": 2,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}
SHAPES = {
    "llama": LLAMA,
    "llama scaled": LLAMA | {"use_rope_scaling": True, "rotary_base": 5e5, "kv_channels": 32},
    "llama biases": LLAMA | {"disable_bias_linear": False},
    "qwen2": LLAMA | {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
    "qwen3": LLAMA | {"qk_layernorm": True, "kv_channels": 32, "rotary_base": 1e6},
    "gpt": {},  # as the configs of this project: GPT-NeoX without parallel residual
    "neox": {
        "rotary_percent": 0.25,
        "use_parallel_residual": True,
        "gelu_approximate": "none",
        "untie_embeddings_and_output_weights": True,
    },
    "gpt2": {"position_embedding_type": "learned_absolute"},
}


def config_of(model=None, precision=None, tokenizer=None):
    return build_config(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "seq_length": SEQUENCE,
                **(model or {}),
            },
            "precision": precision or FP32,
            "train": {"micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1},
            "optimizer": {"lr": 1e-3},
            "data": {"mock_data": True},
            "tokenizer": tokenizer or {"tokenizer_type": "NullTokenizer", "vocab_size": IDS - 1},
        }
    )


def save_model(
    folder, model=None, precision=None, tokenizer=None, config=None, says=None, rows=None
):
    """Write a checkpoint of iteration 1, whose facts are those of `config`, or of `says`.

    `rows` are those of its table (default: for the tokenizer).
    """
    config = config or config_of(model, precision)
    tokenizer = tokenizer or NullTokenizer(IDS - 1)
    rows = rows or -(-tokenizer.vocab_size // 128) * 128
    _, optimizer = build_one_process(config, rows, KERNELS, CPU)
    generator = torch.Generator().manual_seed(1)
    for name, weight in optimizer.weights.items():
        value = torch.randn(weight.spec.shape, generator=generator)
        if value.ndim == 1:
            value = 0.1 * value + (name.endswith("norm.weight"))
        optimizer.initialize(name, 0.1 * value if value.ndim == 2 else value)
    optimizer.share_amax()
    shards = by_name({**model_shards(optimizer.weights), **optimizer_shards(optimizer)})
    meta = {"config": (says or config).model_dump(mode="json"), **made_with(config, tokenizer)}
    save_checkpoint(folder, 1, shards, meta, files=tokenizer.files)
    return folder


def tokens(ids=IDS):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, ids, (BATCH, SEQUENCE), generator=generator)


def restored(folder):
    """The model of a checkpoint, in evaluation mode."""
    with process_groups(CPU) as groups:
        return restore_model(str(folder), groups, CPU).model


@torch.no_grad()
def logits_here(folder, ids=IDS):
    """[B,S,ids] of a checkpoint, in fp32."""
    model = restored(folder)
    return model(tokens(ids)).transpose(0, 1)[..., :ids].float()


@torch.no_grad()
def logits_there(folder, ids=IDS, dtype=torch.float32, **keys):
    """[B,S,ids] of a HuggingFace folder, as transformers computes them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", **keys
    )
    return model.eval()(tokens(ids)).logits.float()


def error(result, expected):
    """Relative error in the Euclidean norm."""
    return ((result - expected).norm() / expected.norm()).item()


def as_bytes(tensor):
    """The bytes of a tensor: NaN equals NaN, and FP8 has no comparison."""
    return tensor.reshape(-1).view(torch.uint8)
