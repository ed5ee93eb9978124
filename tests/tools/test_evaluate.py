"""tools/evaluate.py: two checkpoints side by side, as a table and as JSON."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from fp8lm.checkpoint import open_checkpoint
from fp8lm.convert.hf_export import export_model, plan_export
from fp8lm.evaluation.needle import NeedleReport
from fp8lm.evaluation.perplexity import Perplexity
from tests.evaluation.tasks import save_model as save_for_tasks
from tests.generate.models import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of two precisions, and a text of ids."""
    root = tmp_path_factory.mktemp("evaluate")
    for precision in ("bf16", "o3"):
        save_model(root / precision, "llama", precision)
    (root / "text.txt").write_text(" ".join(str(7 * i % 99) for i in range(300)))
    (root / "words.txt").write_text("words")
    return root


def test_two_checkpoints_side_by_side(run_tool, folder, tmp_path, capfd):
    found = tmp_path / "found.json"
    loads = "--load", folder / "bf16", "--load", folder / "o3"
    code = run_tool(
        "evaluate", *loads, "--data", folder / "text.txt", "--stride", 8, "--json", found
    )
    table, errors = capfd.readouterr()
    assert code == 0, errors
    facts = json.loads(found.read_text())
    first, second = (model["perplexity"] for model in facts["models"])
    assert [model["precision"] for model in facts["models"]] == ["bf16", "o3"]
    assert first["tokens"] == second["tokens"] == 300 and first["window"] == 16
    (difference,) = facts["loss_minus_first"]
    assert difference["value"] == pytest.approx(second["loss"] - first["loss"])
    # The same windows vary together.
    assert difference["stderr"] < second["loss_stderr"]
    rows = {line[:24].strip(): line for line in table.splitlines()}
    assert "bf16 (bf16)" in rows[""] and "o3 (o3)" in rows[""]
    assert f"{first['perplexity']:.4f} +- {first['perplexity_stderr']:.4f}" in rows["perplexity"]
    assert f"{difference['value']:.4f}" in rows["loss minus the first's"]


def test_needles_as_a_picture(run_tool, tool, folder, tmp_path, capfd):
    """A model whose tokenizer has numbers alone cannot read the sentence."""
    options = "--needle", folder / "text.txt", "--heat-map", tmp_path / "map.png"
    code = run_tool("evaluate", "--load", folder / "o3", *options)
    assert code == 2 and "integers" in capfd.readouterr().err
    report = NeedleReport([8], [0.0, 1.0], 4, [[0.25], [1.0]], [[0.0], [2.0]])
    evaluate = tool("evaluate")
    found = evaluate.Report("runs/a", "o3", None, {}, report)
    evaluate.draw([found], tmp_path / "made" / "map.png")
    assert (tmp_path / "made" / "map.png").stat().st_size > 1000
    assert ["needle", "at", "100%", "of", "8", "1.00"] in [
        line.split() for line in evaluate.table([found]).splitlines()
    ]
    assert evaluate.facts([found])["models"][0]["needles"]["recall"] == [[0.25], [1.0]]


def test_the_table_of_tasks(tool):
    evaluate = tool("evaluate")
    tasks = {"piqa": {"acc": 0.5, "acc_stderr": 0.01, "f1,strict": 0.25, "samples": 100}}
    corpus = Perplexity(1, 10, 4, 8, 8, [3.0], [4])
    reports = [
        evaluate.Report("runs/a", "o3", None, tasks),
        evaluate.Report("runs/b", "bf16", corpus, {}),
    ]
    lines = evaluate.table(reports).splitlines()
    assert lines[0].split() == ["a", "(o3)", "b", "(bf16)"]
    assert ["piqa", "acc", "0.5000", "+-", "0.0100"] in [line.split() for line in lines]
    assert ["piqa", "f1,strict", "0.2500"] in [line.split() for line in lines]
    assert ["loss", "0.7500"] in [line.split() for line in lines]  # of one window: no error
    facts = evaluate.facts(reports)
    assert facts["models"][1]["perplexity"]["loss_stderr"] is None  # JSON has no NaN
    assert "loss_minus_first" not in facts


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "--data, --tasks or --needle"),
        (("--data", "none"), "none"),
        (("--data", "$/words.txt"), "integers"),
        (("--data", "$/text.txt", "--window", 65), "--window 65"),
        (("--data", "$/text.txt", "--window", 4, "--stride", 5), "--stride 5"),
        (("--tasks", "a,,b"), "--tasks"),
        (("--heat-map", "a.png", "--tasks", "a"), "--heat-map"),
        (("--needle", "none"), "--needle none"),
        (("--needle", "a", "--needle-depths", "101"), "--needle-depths"),
        (("--data", "$/text.txt", "--tensor-model-parallel-size", 3), "tensor_model_parallel_size"),
    ],
)
def test_bad_input(run_tool, folder, capfd, options, complaint):
    given = [str(option).replace("$", str(folder)) for option in options]
    code = run_tool("evaluate", "--load", folder / "o3", *given)
    out, errors = capfd.readouterr()
    assert (code, out) == (2, "") and complaint in errors
    assert errors.splitlines()[-1].startswith("error: ")


def test_tasks_without_lm_eval(run_tool, folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "fp8lm.evaluation.harness", raising=False)
    code = run_tool("evaluate", "--load", folder / "o3", "--tasks", "piqa")
    errors = capfd.readouterr().err
    assert code == 2 and "fp8lm[eval]" in errors and errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "export", "bound"), [("fp32", "fp32", 1e-4), ("o3", None, 0.02)]
)
def test_perplexity_is_lm_evals_of_the_export(run_tool, tmp_path, precision, export, bound):
    """By its own model of `transformers`; in FP8 activations are cast here alone: 2^-4 each."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import CompressedTensorsConfig

    save_for_tasks(tmp_path, precision)
    texts = ["def return lambda " * n + "yield" for n in (1, 2, 5, 11)]
    data, found = tmp_path / "text.jsonl", tmp_path / "found.json"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = "--data", data, "--window", 48, "--json", found
    assert run_tool("evaluate", "--load", tmp_path / "ck", *given) == 0
    (facts,) = json.loads(found.read_text())["models"]
    plan = plan_export(open_checkpoint(tmp_path / "ck"), export)
    export_model(plan, tmp_path / "hf", 10**9, {}, lambda size: None)
    keys = {} if export else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, **keys)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = HFLM(
        other.eval(),
        tokenizer=tokenizer,
        max_length=48,
        batch_size=1,
        prefix_token_id=tokenizer.eos_token_id,
    )
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    nats = -sum(theirs.loglikelihood_rolling(asked))
    loss = nats / facts["perplexity"]["tokens"]
    assert facts["perplexity"]["loss"] == pytest.approx(loss, rel=bound)
    if export:
        assert facts["perplexity"]["perplexity"] == pytest.approx(math.exp(loss), rel=bound)
