"""Small models with large random weights, whose greedy texts do not repeat themselves."""

from __future__ import annotations

import contextlib
import io

import torch
import torch.distributed as dist

from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import model_parallel_groups, process_groups
from fp8lm.config import build_config
from fp8lm.generate.decoding import Decoding, complete
from fp8lm.generate.loading import load_model
from fp8lm.generate.sampling import Sampling
from fp8lm.training.build import build
from fp8lm.training.hooks import build_trainer

CPU = torch.device("cpu")
SHAPES = {
    "gpt": {"position_embedding_type": "learned_absolute"},
    "llama": {
        "normalization": "RMSNorm",
        "swiglu": True,
        "ffn_hidden_size": 64,
        "num_query_groups": 2,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
    },
}
PRECISIONS = {
    "fp32": {"preset": "bf16", "gemm": "fp32", "params_dtype": "fp32"},
    "bf16": {"preset": "bf16"},
    "te": {"preset": "te"},
    "o3": {"preset": "o3"},
    "te_delayed": {"preset": "te_delayed"},
    "te_margin": {"preset": "te_delayed", "fp8_margin": 1},
    "unit": {"preset": "unit"},
    "deepseek": {"preset": "deepseek"},
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4], [3, 3]]


def save_model(folder, shape, precision, **model):
    """A checkpoint of a model of 64 positions after one step, in `folder`."""
    sizes = {"seq_length": 16, "max_position_embeddings": 64, "init_method_std": 0.3}
    tokenizer = {"tokenizer_type": "NullTokenizer", "vocab_size": 99}
    return save_checkpoint(folder, {**sizes, **SHAPES[shape], **model}, precision, tokenizer)


def save_checkpoint(folder, model, precision, tokenizer):
    """A checkpoint of a small model with these keys after one step, in `folder`."""
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    config = build_config(
        {
            "model": {**sizes, **model},
            "precision": PRECISIONS[precision],
            "train": {
                "micro_batch_size": 1,
                "global_batch_size": 1,
                "train_iters": 1,
                "eval_iters": 0,
                "num_threads": 1,
            },
            "optimizer": {"lr": 1e-3},
            "data": {"mock_data": True},
            "tokenizer": tokenizer,
            "logging": {"tensorboard": False},
            "checkpoint": {"save": str(folder)},
        }
    )
    with contextlib.redirect_stdout(io.StringIO()), process_groups(CPU) as groups:
        trainer = build_trainer(build(config, groups, CPU))
        trainer.load()
        trainer.train()
    return folder


@contextlib.contextmanager
def loaded(folder, tp=1, pp=1):
    """The model in `folder`: in a process alone, or on the ranks of a pool."""
    with contextlib.ExitStack() as stack:
        if dist.is_initialized():
            dims = ParallelDims.divide(dist.get_world_size(), tp=tp, pp=pp)
            groups = stack.enter_context(model_parallel_groups(dims))
        else:
            groups = stack.enter_context(process_groups(CPU))
        model = load_model(folder, groups, CPU)
        stack.enter_context(model.ready())
        yield model


def greedy(count=40, **keys):
    """Decode the likeliest `count` tokens."""
    return Decoding(Sampling(temperature=0.0), count, ignore_eod=True, **keys)


def greedy_tokens(folder, tp, pp, use_cache, cache_dtype="auto", prompts=PROMPTS, count=40):
    """Tokens that follow each of `prompts`, all in one batch."""
    decoding = greedy(count, use_cache=use_cache, cache_dtype=cache_dtype)
    with loaded(folder, tp, pp) as model:
        return [done.tokens for done in complete(model, prompts, decoding)]
