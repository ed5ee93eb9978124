"""tools/generate.py: text from a checkpoint wherever it lies, and odd things that it is asked."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from fp8lm.comm.groups import process_groups
from fp8lm.config import build_config
from fp8lm.training.build import build
from fp8lm.training.hooks import build_trainer
from tests.data.tokenizers_of_all_types import write_config, write_model
from tests.training.conftest import TINY
from tools.hostile import facts, sign

KIND = "HuggingFaceTokenizer"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a checkpoint of a model of 20 positions, whose tokenizer is gone."""
    root = tmp_path_factory.mktemp("generate")
    (root / "hub").mkdir()
    write_model(KIND, root / "hub")
    sections = TINY | {
        "model": TINY["model"] | {"seq_length": 16, "max_position_embeddings": 20},
        "train": TINY["train"] | {"train_iters": 1, "eval_iters": 0},
        "scheduler": {},
        "tokenizer": {"tokenizer_type": KIND, "tokenizer_model": str(root / "hub")},
        "checkpoint": {"save": str(root / "ck")},
    }
    with process_groups(torch.device("cpu")) as groups:
        trainer = build_trainer(build(build_config(sections), groups, torch.device("cpu")))
        trainer.load()
        trainer.train()
    shutil.copytree(root / "hub", root / "kept")
    shutil.rmtree(root / "hub")
    return root


@pytest.fixture
def generate(run_tool, trained, capfd):
    """Exit code, output and complaints."""

    def run(*argv, load=trained / "ck", prompt="def ", count=4):
        capfd.readouterr()
        options = "--load", load, "--max-new-tokens", count, f"--prompt={prompt}"
        code = run_tool("generate", *options, *argv)
        return code, *capfd.readouterr()

    return run


def test_a_checkpoint_moved_alone(generate, run_tool, trained, tmp_path):
    expected = generate()
    assert expected[0] == 0 and expected[1].startswith("def ")
    shutil.copytree(trained / "ck/iter_0000001", tmp_path / "iter_0000001")
    assert generate(load=tmp_path / "iter_0000001") == expected
    for command in ("release", "merge"):
        assert run_tool("checkpoint", command, trained / "ck", tmp_path / command) == 0
        assert generate(load=tmp_path / command) == expected


def test_a_checkpoint_of_before_tokenizers_were_in_it(generate):
    kept = Path(__file__).parents[1] / "checkpoint/kept/78eb969/bf16"
    code, text, complaints = generate(load=kept, prompt="1 2 3")
    assert code == 0 and text.startswith("1 2 3 ") and not complaints


def test_a_newer_checkpoint_that_is_damaged_is_named(generate, trained, tmp_path):
    shutil.copytree(trained / "ck", tmp_path / "ck")
    shutil.copytree(trained / "ck/iter_0000001", tmp_path / "ck/iter_0000002")
    next((tmp_path / "ck/iter_0000002").glob("*.distcp")).write_bytes(b"")
    (tmp_path / "ck/latest_checkpointed_iteration.txt").write_text("2")
    code, text, complaints = generate(load=tmp_path / "ck")
    assert (code, text) == generate()[:2]
    assert complaints.startswith("warning: passed over a checkpoint: iteration 2: ")


def test_another_tokenizer_by_option(generate, trained, tmp_path):
    assert generate("--tokenizer-model", trained / "kept") == generate()
    shutil.copytree(trained / "kept", tmp_path / "other")
    write_config(tmp_path / "other", eos_token="<|endoftext|>")
    code, _, complaints = generate("--tokenizer-model", tmp_path / "other")
    assert code == 0 and complaints.startswith("warning: not the tokenizer of the training")
    code, _, complaints = generate("--tokenizer-model", tmp_path / "nothing")
    assert code == 2 and complaints.count("\n") == 1 and "nothing" in complaints


@pytest.mark.parametrize("temperature", ["1e-40", "5e-324"])
def test_next_to_no_temperature_is_the_likeliest(temperature, generate):
    code, text, _ = generate(f"--temperature={temperature}")
    assert code == 0 and text == generate("--temperature=0")[1]


def test_large_numbers(generate):
    assert generate("--temperature=1e308", "--top-k", 10**30)[0] == 0


@pytest.mark.parametrize(("length", "new"), [(16, 4), (19, 2), (20, 1)])
def test_text_ends_with_the_context(length, new, generate):
    code, out, _ = generate("--json", "--ignore-eod", prompt="!" * length, count=9)
    done = json.loads(out)
    assert code == 0 and len(done["prompt_tokens"]) == length  # byte tokens
    # The token after the last position is still known.
    assert len(done["tokens"]) == 21 - length and done["finish_reason"] == "context"


@pytest.mark.parametrize("length", [21, 300])
def test_a_prompt_longer_than_the_context(length, generate):
    code, out, complaints = generate(prompt="!" * length)
    assert (code, out) == (2, "") and complaints.count("\n") == 1
    assert f"{length} tokens" in complaints and "20" in complaints


def test_several_prompts_from_a_file_as_json_lines(generate, run_tool, trained, tmp_path, capfd):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts = ["def ", "a", "class b"]
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in prompts) + "\n\n")
    options = "--load", trained / "ck", "--prompts-file", file, "--max-new-tokens", 4
    assert run_tool("generate", *options, "--json", out, "--batch-size", 2) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [done["prompt"] for done in found] == prompts
    # A prompt's number decides its random numbers, not the batch that it is in.
    assert run_tool("generate", *options, "--json", out, "--no-cache") == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == found
    assert generate("--json")[1] == json.dumps(found[0]) + "\n"
    assert run_tool("generate", *options) == 0
    assert capfd.readouterr().out.startswith("def ")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b" \n\n", "no prompts"),
        ("a.txt", b"\xff", "UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{', "line 2"),
        ("a.jsonl", b'{"text": "a"}', "line 1"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "line 1"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.txt", b"a\n" + b"!" * 30, "prompt 2"),
    ],
)
def test_files_without_prompts(run_tool, trained, tmp_path, capfd, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    code = run_tool("generate", "--load", trained / "ck", "--prompts-file", tmp_path / name)
    errors = capfd.readouterr().err
    assert code == 2 and errors.count("\n") == 1 and complaint in errors


def test_streamed_text_is_the_text(generate):
    assert generate("--stream") == generate()
    assert generate("--stop", " ")[0] == 0


def test_a_conversation(run_tool, trained, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n\n/clear\n" + "x" * 40 + "\nb\n/exit\nc\n"))
    code = run_tool("generate", "--load", trained / "ck", "--chat", "--max-new-tokens", 2)
    out, errors = capfd.readouterr()
    # "User: a\nAssistant:" has 19 byte tokens, of 20 positions.
    assert code == 0, errors
    assert out.count("\n") >= 3 and errors.count("error:") == 1


@pytest.mark.parametrize("prompt", ["", "\udcff", "a\ud800b"])
def test_prompts_that_are_no_text(prompt, generate):
    code, text, complaints = generate(prompt=prompt)
    assert (code, text) == (2, "") and complaints.startswith("error: --prompt")
    assert complaints.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10**9},
        {"num_layers": 3},
        {"num_layers": 1},
        {"hidden_size": 2**30, "ffn_hidden_size": 2**32},
        {"ffn_hidden_size": 2**40},
        {"num_layers": -1},
        {"max_position_embeddings": 10**8},
    ],
)
def test_a_config_of_another_model_in_the_checkpoint(generate, trained, tmp_path, change):
    """A checkpoint that somebody has rewritten takes neither time nor memory."""
    shutil.copytree(trained / "ck", tmp_path / "ck")
    folder = tmp_path / "ck" / "iter_0000001"
    config = json.loads((folder / "common.json").read_text())["config"]
    facts(config=config | {"model": config["model"] | change})(folder)
    sign(folder)
    code, out, err = generate(load=tmp_path / "ck")
    assert code == 2 and out == "" and len(err.splitlines()) == 1
