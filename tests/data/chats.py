"""Conversations, templates and a tokenizer for them."""

from __future__ import annotations

import json

from fp8lm.config import build_config
from fp8lm.data.chat import ChatTemplate
from fp8lm.data.tokenizer import load_tokenizer
from tests.data.tokenizers_of_all_types import write_sentencepiece

PLAIN = "configs/chat_templates/plain.jinja"
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

SIZES = (20, 2, 0)


def turns(*texts, system=None):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def sentencepiece(folder):
    return load_tokenizer("SentencePieceTokenizer", write_sentencepiece(folder / "tok.model"))


def template(tokenizer, source=BRACKETS):
    return ChatTemplate.of_source(source, tokenizer, "the chat template")


def write_lines(path, *objects):
    path.write_text("".join(json.dumps(fields) + "\n" for fields in objects))
    return str(path)


LINES = [{"messages": turns("def " * (i % 5 + 1), "yield " * (i % 3 + 1))} for i in range(20)]


def sft_config(folder, paths, tuning=None, objective="sft", **data):
    """A config that reads `paths` with the tokenizer `sentencepiece` wrote to `folder`."""
    model = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 64}
    batches = {"micro_batch_size": 1, "global_batch_size": 2, "train_iters": 10, "eval_iters": 1}
    return build_config(
        {
            "model": model,
            "train": {"objective": objective, **batches},
            "optimizer": {"lr": 1e-3},
            "tokenizer": {"tokenizer_model": str(folder / "tok.model")},
            "tuning": tuning or {},
            "data": {"data_path": paths, "split": "80,20,0", **data},
        }
    )
