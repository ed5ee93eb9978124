"""Training on answers: packed or one by one, on one process or several, here or in transformers."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fp8lm.batch import Batch
from fp8lm.checkpoint import open_checkpoint
from fp8lm.config import build_config
from fp8lm.convert.hf_export import export_model, plan_export
from fp8lm.data.chat import ChatTemplate
from fp8lm.model.objectives import AnswerModeling
from fp8lm.runtime.errors import InputError
from fp8lm.training.provenance import tokenizer_of
from tests.data.chats import BRACKETS, sentencepiece, turns, write_lines
from tests.training.runs import LLAMA, curve, read, train

FP32 = {"preset": "bf16", "gemm": "fp32", "params_dtype": "fp32", "wire": {"grads": "fp32"}}
BOUND = 1e-6  # a sum's roundings, 2^-24 each


@pytest.fixture
def sft_config(tiny_config, tmp_path):
    """`sft_config(run, *changes)`: mock conversations, reported every step to the folder `run`."""

    def make(run, *changes, precision=FP32):
        return tiny_config(
            {"model": {"num_layers": 2, "seq_length": 32}, "precision": precision},
            {"train": {"objective": "sft", "train_iters": 3, "eval_interval": 3, "eval_iters": 4}},
            {"scheduler": {"lr_warmup_iters": 0}},
            {"logging": {"dir": str(tmp_path / run), "log_interval": 1}},
            *changes,
        )

    return make


def losses(folder):
    """Losses, gradient norms and held-out results of a run."""
    keys = ("lm loss", "grad-norm", "lm loss validation", "token accuracy validation")
    return torch.tensor([line[key] for key in keys for line in read(folder) if key in line])


def close(found, expected, bound=BOUND, **case):
    torch.testing.assert_close(found, expected, rtol=bound, atol=0, msg=lambda m: f"{case}: {m}")


def test_answers_of_a_step_weigh_the_same_however_it_is_cut(sft_config, train_run, tmp_path):
    """Micro-batches have unequal numbers of answer tokens, and equal one large batch."""
    batch = {"micro_batch_size": 8, "global_batch_size": 8}
    train_run(sft_config("whole", {"train": batch}))
    train_run(sft_config("cut", {"train": batch | {"micro_batch_size": 1}}))
    whole = losses(tmp_path / "whole")
    assert abs(whole[0] - math.log(64)) < 0.1
    close(losses(tmp_path / "cut"), whole)
    metrics = read(tmp_path / "cut")
    epochs = [line["epoch"] for line in metrics if "epoch" in line]
    assert epochs[1] == 2 * epochs[0] > 0


LAYOUTS = {
    "dp2 zero": (2, {}),
    "tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}


@pytest.mark.slow
def test_layouts_are_one_process(sft_config, run_distributed, tmp_path):
    run_distributed(train, 1, sft_config("one"))
    for name, (ranks, parallel) in LAYOUTS.items():
        run_distributed(train, ranks, sft_config(name, {"parallel": parallel}))
        close(losses(tmp_path / name), losses(tmp_path / "one"), layout=name)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(sft_config, run_distributed, folders, tmp_path):
    def config(run, **keys):
        return sft_config(run, folders(run), {"train": keys}, precision={"preset": "o3"})

    whole = run_distributed(train, 1, config("whole"))
    run_distributed(train, 1, config("parts", exit_interval=2))
    ((state, _),) = run_distributed(train, 1, config("parts"))
    assert all(torch.equal(state[name], whole[0][0][name]) for name in state)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    with pytest.raises(InputError, match=r"objective = sft, and now it is pretrain.*pretrained="):
        run_distributed(train, 1, config("parts", objective="pretrain", train_iters=4))


def test_accuracy_is_the_share_of_counted_labels_that_are_likeliest():
    logits = torch.tensor([[[3.0, 1, 0]], [[0, 1, 1]], [[0, 2, 1]], [[9, 0, 0]]])
    labels = torch.tensor([[0, 2, 1, 1]])
    batch = Batch(labels, labels, torch.tensor([[1.0, 1, 1, 0]]))
    objective = AnswerModeling().for_evaluation()
    assert objective.metrics == ("token accuracy",)
    _, accuracy = objective.loss_and_metrics(logits, batch)
    # The first of two that are likeliest is not the label; the last does not count.
    torch.testing.assert_close(accuracy / objective.counted_share([batch]), torch.tensor(2 / 3))
    assert len(AnswerModeling().loss_and_metrics(logits, batch)) == 1


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """A folder with a tokenizer, a template and lines of conversations."""
    folder = tmp_path_factory.mktemp("conversations")
    sentencepiece(folder)
    (folder / "t.jinja").write_text(BRACKETS)
    texts = ["def " * (i % 4 + 1) for i in range(12)]
    write_lines(folder / "x.jsonl", *({"messages": turns(text, "yield " + text)} for text in texts))
    return folder


@pytest.fixture
def text_config(conversations, tmp_path):
    def make(*changes):
        sections = {
            "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
            | {"seq_length": 64, **LLAMA},
            "precision": FP32,
            "train": {"objective": "sft", "micro_batch_size": 2, "global_batch_size": 2}
            | {"train_iters": 2, "eval_interval": 1, "eval_iters": 1, "num_threads": 1},
            "optimizer": {"lr": 1e-2},
            "data": {"data_path": [str(conversations / "x.jsonl")], "split": "50,50,0"},
            "tuning": {"chat_template": str(conversations / "t.jinja")},
            "tokenizer": {"tokenizer_model": str(conversations / "tok.model")},
            "checkpoint": {"save": str(tmp_path / "ck")},
            "logging": {"dir": str(tmp_path / "log"), "log_interval": 1, "tensorboard": False},
        }
        for change in changes:
            for name, keys in change.items():
                sections[name] = sections.get(name, {}) | keys
        return build_config(sections)

    return make


def test_packed_equals_one_by_one(text_config, train_run, read_metrics, tmp_path):
    """Held-out loss and accuracy of a model do not depend on what is packed with what."""
    found = []
    for packing in (True, False):
        folder = tmp_path / str(packing)
        train = {"train_iters": 1, "eval_iters": 3}
        tuning = {"tuning": {"packing": packing}, "logging": {"dir": str(folder)}}
        train_run(text_config({"train": train, "checkpoint": {"save": None}}, tuning))
        found.append(losses(folder)[2:])  # before training the models are the same
    assert len(found[0]) == 4
    close(found[0][[0, 2]], found[1][[0, 2]])


def test_a_template_without_an_end_is_told(text_config, train_run, conversations, capfd):
    """One warning, of the training examples."""
    (conversations / "endless.jinja").write_text(BRACKETS.replace("{{ eos_token }}", ""))
    for name, count in (("t.jinja", 0), ("endless.jinja", 1)):
        template = {"tuning": {"chat_template": str(conversations / name)}}
        once = {"train": {"train_iters": 1, "eval_iters": 0}, "checkpoint": {"save": None}}
        train_run(text_config(once, template))
        assert capfd.readouterr().out.count("no answer ends with the end-of-document") == count


@pytest.mark.slow
def test_transformers_has_the_same_loss(text_config, train_run, conversations, tmp_path):
    """Of the exported model on the same conversations, one by one: -log p over answers' tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train_run(text_config({"train": {"eval_iters": 3}}))
    found = [line.get("lm loss validation") for line in read(tmp_path / "log")]
    validation = torch.tensor([loss for loss in found if loss is not None][-1])
    checkpoint = open_checkpoint(tmp_path / "ck")
    export_model(plan_export(checkpoint, "fp32"), tmp_path / "hf", 10**9, {}, lambda size: None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert ChatTemplate.of(tokenizer_of(checkpoint)).source == BRACKETS
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    lines = (conversations / "x.jsonl").read_text().splitlines()[6:]
    total, count = 0.0, 0
    for line in lines:
        messages = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)
        labels = ids["input_ids"].clone()
        labels[:, : len(prompt["input_ids"])] = -100
        with torch.no_grad():
            loss = model(**ids, labels=labels).loss
        answers = int((labels[:, 1:] != -100).sum())
        total, count = total + loss.item() * answers, count + answers
    close(validation, torch.tensor(total / count), 1e-5)
