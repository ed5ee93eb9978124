"""`~` and variables of the environment in what names files and folders."""

from __future__ import annotations

import argparse
import re

import pytest

from fp8lm.config import Config, build_config, load_config
from fp8lm.config.keys import list_keys
from fp8lm.config.paths import expand_keys
from fp8lm.runtime.errors import CommandParser, InputError

KEYS = (
    "data.data_cache_path",
    "tokenizer.tokenizer_model",
    "checkpoint.save",
    "checkpoint.load",
    "logging.dir",
    "logging.wandb_save_dir",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)


def expanded(path, text):
    section, name = path.split(".")
    content, problems = expand_keys(Config, {section: {name: text}})
    assert not problems
    return content[section][name]


@pytest.mark.parametrize("path", [*KEYS, "data.data_path"])
@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("~/ck", "/home/me/ck"),
        ("~", "/home/me"),
        ("$SCRATCH/ck", "/scratch/ck"),
        ("a/${SCRATCH}b", "a//scratchb"),
        ("ck", "ck"),
        ("../ck", "../ck"),
        ("./~/ck", "./~/ck"),
        ("a~", "a~"),
        ("cost$", "cost$"),
        ("$5", "$5"),
    ],
)
def test_every_path_is_expanded(path, text, result):
    assert expanded(path, text) == result


def test_paths_of_a_blend_are_expanded():
    assert expanded("data.data_path", [0.3, "~/a", 1, "$SCRATCH/b"]) == [
        0.3,
        "/home/me/a",
        1,
        "/scratch/b",
    ]


def test_every_key_that_names_a_file_or_folder_is_one_of_them():
    """Judged by what it is called and by what its description says."""
    for key in list_keys().values():
        named = re.search(r"(^|_)(path|dir|save|load|model|file|folder)$", key.name)
        described = re.match(r"(Local )?(file|folder)s? ", key.meaning, re.IGNORECASE)
        if "text" in key.type and (named or described):
            expanded(key.path, "~/x")
            assert expanded(key.path, "~/x") == "/home/me/x", key.path


def test_names_that_are_no_paths_stay_as_they_are(config_file):
    config = load_config(config_file, ["logging.wandb_exp_name=~a$SCRATCH"])
    assert config.logging.wandb_exp_name == "~a$SCRATCH"


def test_the_resolved_config_has_the_expansion_and_loads_again(config_file, tmp_path):
    config = load_config(config_file, ["checkpoint.save=~/ck", "logging.dir=$SCRATCH/runs"])
    config.save_yaml(tmp_path / "resolved.yaml")
    text = (tmp_path / "resolved.yaml").read_text()
    assert "save: /home/me/ck" in text and "dir: /scratch/runs" in text
    assert load_config(tmp_path / "resolved.yaml") == config


def test_configs_of_checkpoints_are_taken_as_they_are(content):
    """They are resolved, and the machine that reads them has other variables."""
    content["checkpoint"] = {"save": "$NOT_SET/ck"}
    assert build_config(content).checkpoint.save == "$NOT_SET/ck"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("$NOT_SET/ck", "checkpoint.save: the variable NOT_SET of the environment is not set"),
        ("${NOT_SET}/ck", "variable NOT_SET .* is not set"),
        ("$EMPTY/ck", "variable EMPTY of the environment is empty"),
        ("~nobody_of_that_name/ck", "no|user 'nobody_of_that_name'.*write ./~nobody_of_that_name"),
        ("${SCRATCH:-/tmp}/ck", "is not \\$NAME or"),
        ("${SCRATCH/ck", "is not \\$NAME or"),
        ("$(pwd)/ck", "is not \\$NAME or"),
        ("${}/ck", "is not \\$NAME or"),
    ],
)
def test_what_cannot_be_expanded_is_named_beside_all_else_that_is_wrong(
    config_file, text, complaint
):
    with pytest.raises(InputError, match=complaint) as caught:
        load_config(config_file, [f"checkpoint.save='{text}'", "train.seed=x", "model.foo=1"])
    assert "checkpoint.save" in str(caught.value)
    assert "train.seed" in str(caught.value) and "model.foo" in str(caught.value)


def test_the_config_and_its_bases_may_be_at_home(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "top.yaml").write_text("base: [~/config.yaml, $SCRATCH/config.yaml]\n")
    assert load_config("~/sub/top.yaml").model.num_layers == 2
    assert load_config("$SCRATCH/sub/top.yaml").model.num_layers == 2
    with pytest.raises(InputError, match="--config: the variable NOT_SET"):
        load_config("$NOT_SET/top.yaml")
    (tmp_path / "top.yaml").write_text("base: $NOT_SET/config.yaml\n")
    with pytest.raises(InputError, match=r"top\.yaml: base: the variable NOT_SET"):
        load_config(tmp_path / "top.yaml")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("~/x", "/home/me/x"), ("a~/x", "a~/x"), ("./~/x", "./~/x"), ("~", "~"), ("", "")],
)
def test_options_of_tools_mean_with_an_equals_sign_what_they_mean_without(argument, value):
    parser = CommandParser()
    assert isinstance(parser, argparse.ArgumentParser)
    parser.add_argument("--input")
    assert parser.parse_args([f"--input={argument}"]).input == value
