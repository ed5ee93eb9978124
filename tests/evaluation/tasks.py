"""A model with a tokenizer for text, and tasks of local files in lm-eval's format."""

from __future__ import annotations

import json
import random

from tests.data.tokenizers_of_all_types import write_model
from tests.generate.models import SHAPES, save_checkpoint

WORDS = ["def", "return", "lambda", "yield", "for", "while", "class", "import", "pass", "else"]
KIND = "HuggingFaceTokenizer"
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} ",  # the space belongs to what follows
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "words": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", "def"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def save_model(folder, precision):
    """A checkpoint in `folder`/ck whose tokenizer is in `folder`/hub."""
    (folder / "hub").mkdir()
    write_model(KIND, folder / "hub")
    sizes = {"seq_length": 32, "max_position_embeddings": 48, "init_method_std": 0.15}
    tokenizer = {"tokenizer_type": KIND, "tokenizer_model": str(folder / "hub")}
    return save_checkpoint(folder / "ck", sizes | SHAPES["llama"], precision, tokenizer)


def write_tasks(folder, items=10):
    """Definitions in `folder`/tasks, their data in `folder`/data."""
    draw = random.Random(0)
    lines = []
    for _ in range(items):
        question = " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))
        choices = [" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(4)]
        lines.append({"question": question, "choices": choices, "label": draw.randrange(4)})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "tasks").mkdir(parents=True)
    for name, definition in TASKS.items():
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "test.jsonl").write_text(text)
        of_hub = {"task": name, "dataset_path": "nobody/nothing", "test_split": "test"}
        # JSON is YAML.
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(of_hub | definition))
    return folder / "tasks", folder / "data", lines
