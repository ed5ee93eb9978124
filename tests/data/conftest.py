"""A process group of one, a config of a few keys, and token files made from plain lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist

from fp8lm.config import build_config
from fp8lm.data.indexed_writer import IndexedWriter
from fp8lm.data.tokenizer import NullTokenizer
from tests.data.tokenizers_of_all_types import train_bpe

VOCAB_SIZE, SEQ_LENGTH = 50, 16


@pytest.fixture
def process_group():
    """As in a run of one process; megatron-core asks for its rank when it caches a blend."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def tokenizer():
    return NullTokenizer(VOCAB_SIZE)


@pytest.fixture
def make_config():
    def make(seed=1234, eval_iters=1, **data):
        return build_config(
            {
                "model": {
                    "num_layers": 1,
                    "hidden_size": 16,
                    "num_attention_heads": 2,
                    "seq_length": SEQ_LENGTH,
                },
                "train": {
                    "micro_batch_size": 1,
                    "global_batch_size": 1,
                    "train_iters": 1,
                    "seed": seed,
                    "eval_iters": eval_iters,
                },
                "optimizer": {"lr": 1e-3},
                "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": VOCAB_SIZE},
                "data": data,
            }
        )

    return make


@pytest.fixture
def write_documents(tmp_path, tokenizer):
    """Write documents, lists of ids, as Megatron's files and return their prefix."""

    def write(documents, name="P", dtype=np.uint16, identity=None, append_eod=False):
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, dtype) as writer:
            for document in documents:
                writer.add(np.array(document, dtype))
            made_by = identity or tokenizer.identity
            writer.publish({"tokenizer": made_by, "append_eod": append_eod})
        return prefix

    return write


@pytest.fixture(scope="session")
def bpe():
    return train_bpe()


@pytest.fixture
def hub_folder(tmp_path, bpe):
    bpe.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def gpt2_folder(tmp_path, bpe):
    bpe.model.save(str(tmp_path))
    return tmp_path
