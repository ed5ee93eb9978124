"""Preference training: layouts, resuming, the reference, and transformers on the same pairs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional

from fp8lm.checkpoint import open_checkpoint
from fp8lm.convert.hf_export import export_model, plan_export
from fp8lm.runtime.errors import InputError
from tests.data.chats import sentencepiece, write_lines
from tests.training.runs import LLAMA, curve, read, train, trainer_of

FP32 = {"preset": "bf16", "gemm": "fp32", "params_dtype": "fp32", "wire": {"grads": "fp32"}}
KEYS = ("lm loss", "grad-norm", "rewards/margins", "kl")


@pytest.fixture
def dpo_config(tiny_config, tmp_path):
    """`dpo_config(run, *changes)`: mock preferences, reported every step to the folder `run`."""

    def make(run, *changes, precision=FP32):
        return tiny_config(
            {"model": {"num_layers": 4, "seq_length": 32}, "precision": precision},
            {"train": {"objective": "dpo", "train_iters": 3, "eval_interval": 3, "eval_iters": 1}},
            {"scheduler": {"lr_warmup_iters": 0}, "tuning": {"beta": 0.5}},
            {"logging": {"dir": str(tmp_path / run), "log_interval": 1}},
            *changes,
        )

    return make


def numbers(folder, keys=KEYS):
    lines = read(folder)
    held_out = [f"{key} validation" for key in keys]
    return torch.tensor([line[key] for key in (*keys, *held_out) for line in lines if key in line])


# Differences of log-probabilities that cancel to a hundredth: roundings of 2^-24 of these.
def close(found, expected, **case):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda m: f"{case}: {m}")


def test_a_batch_is_its_micro_batches(dpo_config, train_run, tmp_path):
    batch = {"micro_batch_size": 8, "global_batch_size": 8}
    train_run(dpo_config("whole", {"train": batch}))
    train_run(dpo_config("cut", {"train": batch | {"micro_batch_size": 1}}))
    close(numbers(tmp_path / "cut"), numbers(tmp_path / "whole"))


LAYOUTS = {
    "dp2 zero": {},
    "tp2 sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2 interleaved": {
        "pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 1,
    },
}


@pytest.mark.slow
def test_layouts_are_one_process(dpo_config, run_distributed, tmp_path):
    run_distributed(train, 1, dpo_config("one"))
    expected = numbers(tmp_path / "one")
    assert expected[0] == pytest.approx(math.log(2.0), abs=1e-6) and expected[2] < expected[0]
    for name, parallel in LAYOUTS.items():
        run_distributed(train, 2, dpo_config(name, {"parallel": parallel}))
        close(numbers(tmp_path / name), expected, layout=name)


def started(config):
    """Losses of the first step, bytes of the reference and of weights, elements of both."""
    with trainer_of(config) as trainer:
        trainer.train()
        run = trainer.run
    elements = sum(weight.spec.numel for weight in run.weights.values())
    formats = {str(w.spec.format) for n, w in run.reference.weights.items() if ".linear" in n}
    grads = [weight.spec.trainable for weight in run.reference.weights.values()]
    return run.reference.nbytes, elements, formats, any(grads)


@pytest.mark.parametrize("preset", ["bf16", "te", "o1", "o3"])
def test_the_reference_is_what_the_run_starts_from(preset, dpo_config, run_distributed, tmp_path):
    """Same bits as the model's until the first step, and in FP8 a byte per parameter."""
    config = dpo_config("run", {"train": {"train_iters": 1}}, precision={"preset": preset})
    ((held, elements, formats, trains),) = run_distributed(started, 1, config)
    lines = read(tmp_path / "run")
    assert all(line["rewards/margins"] == line["kl"] == 0.0 for line in lines if "kl" in line)
    assert lines[-1]["rewards/margins validation"] != 0.0 and not trains
    assert formats == {"bf16"} if preset == "bf16" else {"fp8_e4m3"}
    first = next(line for line in lines if "state_bytes/reference" in line)
    assert first["state_bytes/reference"] == held
    assert first["state_bytes_per_parameter"] == pytest.approx(
        sum(value for key, value in first.items() if key.startswith("state_bytes/")) / elements
    )


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(dpo_config, run_distributed, folders, tmp_path):
    run_distributed(
        train,
        1,
        dpo_config(
            "base",
            folders("base"),
            {"train": {"objective": "sft"}},
            {"tuning": {"beta": 0.1}},
            precision={"preset": "o3"},
        ),
    )

    def config(run, **keys):
        changes = folders(run)
        changes["checkpoint"]["pretrained"] = str(tmp_path / "base")
        return dpo_config(run, changes, {"train": keys}, precision={"preset": "o3"})

    whole = run_distributed(train, 1, config("whole"))
    run_distributed(train, 1, config("parts", exit_interval=2))
    ((state, _),) = run_distributed(train, 1, config("parts"))
    assert all(torch.equal(state[name], whole[0][0][name]) for name in state)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    other = folders("parts")  # from initial weights, not those of base
    with pytest.raises(InputError, match="another reference model"):
        run_distributed(train, 1, dpo_config("parts", other, precision={"preset": "o3"}))


WORDS = ("def", "yield", "lambda", "return")
PAIRS = [
    {"prompt": f"{a} {b} ", "chosen": f"{b} {a}", "rejected": f"{a} {b} {a}"}
    for a in WORDS
    for b in WORDS
    if a != b
]


@pytest.mark.slow
def test_transformers_has_the_same_log_probabilities_and_loss(
    tiny_config, train_run, read_metrics, tmp_path
):
    """Model and reference exported; sums of log p over answers, and the published loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sentencepiece(tmp_path)
    lines = write_lines(tmp_path / "pairs.jsonl", *PAIRS)

    def config(run, objective, **sections):
        return tiny_config(
            {"model": {"seq_length": 96, **LLAMA}, "precision": FP32},
            {"train": {"train_iters": 2, "eval_iters": 2, "objective": objective}},
            {"scheduler": {"lr_warmup_iters": 0}},
            {"tokenizer": {"tokenizer_type": "SentencePieceTokenizer", "vocab_size": None}},
            {"tokenizer": {"tokenizer_model": str(tmp_path / "tok.model")}},
            {"data": {"mock_data": False, "data_path": [lines], "split": "50,50,0"}},
            {"checkpoint": {"save": str(tmp_path / run)}, "logging": {"dir": str(tmp_path / run)}},
            sections,
        )

    chats = write_lines(tmp_path / "chats.jsonl", *({"prompt": "def", "completion": "yield"},) * 8)
    train_run(config("base", "sft", data={"data_path": [chats]}))
    pretrained = {"pretrained": str(tmp_path / "base")}
    train_run(config("run", "dpo", checkpoint=pretrained, tuning={"beta": 0.5}))
    models = {}
    for name in ("base", "run"):
        plan = plan_export(open_checkpoint(tmp_path / name), "fp32")
        export_model(plan, tmp_path / f"{name}_hf", 10**9, {}, lambda size: None)
        models[name] = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}_hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run_hf")

    @torch.no_grad()
    def log_p(model, prompt, answer):
        asked = tokenizer.encode(prompt, add_special_tokens=False)
        ids = tokenizer.encode(prompt + answer, add_special_tokens=False)
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        scores = models[model](ids).logits[0, :-1].double().log_softmax(-1)
        return scores.gather(-1, ids[0, 1:, None])[len(asked) - 1 :].sum()

    chosen, losses = [], []
    for pair in map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines()[6:]):
        by_answer = [
            [log_p(model, pair["prompt"], pair[side]) for model in ("run", "base")]
            for side in ("chosen", "rejected")
        ]
        (win, win_ref), (lose, lose_ref) = by_answer
        losses.append(-functional.logsigmoid(0.5 * ((win - win_ref) - (lose - lose_ref))))
        chosen.append(win)
    last = {key: value for line in read_metrics(tmp_path / "run") for key, value in line.items()}
    for key, values in (("lm loss validation", losses), ("logps/chosen validation", chosen)):
        expected = torch.stack(values).mean().item()
        assert last[key] == pytest.approx(expected, rel=1e-5), key
