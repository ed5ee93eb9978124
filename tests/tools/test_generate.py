"""tools/generate.py: text from a checkpoint wherever it lies, and odd things that it is asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fp8lm.comm.groups import process_groups
from fp8lm.config import build_config
from fp8lm.runtime.errors import InputError
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


@pytest.mark.parametrize("length", [16, 19, 300])
def test_prompts_around_the_number_of_positions(length, generate):
    prompt = "!?" * length  # byte tokens
    code, text, complaints = generate(prompt=prompt, count=2)
    assert code == 0, complaints
    assert text.startswith(prompt)


@pytest.mark.parametrize("prompt", ["", "\udcff", "a\ud800b"])
def test_prompts_that_are_no_text(prompt, generate):
    code, text, complaints = generate(prompt=prompt)
    assert (code, text) == (2, "") and complaints.startswith("error: --prompt")
    assert complaints.count("\n") == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite(value, temperature, tool):
    logits = torch.tensor([0.0, value, 1.0])
    with pytest.raises(InputError, match="not finite"):
        tool("generate").choose(logits, temperature, 40, torch.Generator())


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
