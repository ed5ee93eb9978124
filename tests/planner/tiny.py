"""A tiny config, and ways to divide it."""

from __future__ import annotations

from fp8lm.config import build_config

TINY = {
    "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 16},
    "train": {"micro_batch_size": 2, "global_batch_size": 16, "train_iters": 2, "eval_iters": 0},
    "optimizer": {"lr": 1e-2},
    "data": {"mock_data": True},
    "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": 200},
}
NUM_IDS = 201


def tiny(**sections):
    return build_config({name: TINY.get(name, {}) | sections.get(name, {}) for name in NAMES})


NAMES = (*TINY, "parallel", "precision")
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
UNEVEN = {"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 1}
INTERLEAVED = {"num_layers_per_virtual_pipeline_stage": 1}
