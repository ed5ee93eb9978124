"""The smallest complete config, as a mapping to change and as a YAML file."""

from __future__ import annotations

import pytest
import yaml


@pytest.fixture
def content():
    return {
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "seq_length": 32,
        },
        "train": {"micro_batch_size": 2, "global_batch_size": 4, "train_iters": 10},
        "optimizer": {"lr": 1e-3},
        "data": {"mock_data": True},
        "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": 255},
    }


@pytest.fixture
def config_file(content, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
