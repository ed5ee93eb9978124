"""Flags of Megatron's: what the messages say of them is true, and is what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fp8lm.config import parse_command_line
from fp8lm.config.keys import find_key, list_keys, suggest
from fp8lm.config.loading import load_config
from fp8lm.config.megatron_keys import NOT_HERE, RENAMED, megatron_advice, megatron_names
from fp8lm.runtime.errors import InputError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/user-guide/migration.md").read_text().split("## Megatron-LM: data")[0]
SECTIONS = "|".join({key.section for key in list_keys().values()})
KEY = re.compile(rf"(?<![\w./-])(?:{SECTIONS})\.[a-z_0-9]+(?:\.[a-z_0-9]+)?")


def flags_in(text):
    return [flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*\w)", text)]


def test_there_are_many_and_none_is_a_key():
    """What has become a key here is to be dropped from the tables."""
    names = megatron_names()
    assert len(set(names)) == len(names) > 300
    keys = {key.rpartition(".")[2] for key in list_keys()}
    assert not keys & {name.rpartition(".")[2] for name in names if "." not in name}


@pytest.mark.parametrize("text", sorted(set(RENAMED.values())))
def test_each_leads_to_a_key_and_a_value_that_it_takes(text):
    keys = list_keys()
    named = KEY.findall(text)
    assert named and set(named) <= keys.keys()
    key, equals, value = text.partition(" ")[0].rstrip(",;").partition("=")
    if equals and value.islower():
        assert value in keys[key].type or value in ("true", "false")


def test_reasons_name_keys_that_exist():
    keys = list_keys()
    for name in megatron_names():
        assert set(KEY.findall(megatron_advice(name))) <= keys.keys()


@pytest.mark.parametrize("section", ["", "model.", "train.", "precision."])
@pytest.mark.parametrize("spelling", [str, lambda name: name.replace("_", "-")])
def test_each_is_told_in_any_section_and_spelling(section, spelling):
    keys = list_keys()
    sections = {key.section for key in keys.values()}
    for name in megatron_names():
        if name not in sections and "." not in name:
            assert suggest(section + spelling(name), keys) == megatron_advice(name)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("parallel.context_parallel_size", "not here (context parallelism): drop it"),
        ("parallel.expert_model_parallel_size", "not here (mixture of experts): drop it"),
        ("precision.wire.context", "not here (context parallelism)"),
        ("precision.wire.dispatch", "not here (mixture of experts)"),
        ("precision.wire.combine", "not here (mixture of experts)"),
        ("model.moe_something_new", "not here (mixture of experts)"),
        ("train.bf16", "here it is precision.preset=bf16"),
        ("parallel.context_paralel_size", "did you mean context_parallel_size? not here"),
        ("model.hiden_size", "did you mean model.hidden_size?"),
        ("train.tensor-model-parallel-size", "did you mean parallel.tensor_model_parallel_size?"),
        ("model.vision_tower", "not here (BERT"),
        ("checkpoint.dir", "here it is checkpoint.save"),
        ("data.dir", "did you mean logging.dir?"),
        ("optimizer.type", "not needed here (AdamW"),
        ("optimizer.kind", "--help lists its keys"),
        ("model.type", "did you mean model.position_embedding_type?"),
        ("batch_size", "here it is train.micro_batch_size"),
        ("interval", "the sections are"),
        ("parallel.tp", "here it is parallel.tensor_model_parallel_size"),
        ("parallel.cp", "not here (context parallelism)"),
        ("parallel.data_replication", "--help lists its keys"),
        ("train.reset_attention_mask", "did you mean data.reset_attention_mask?"),
        ("optimizer.decoupled_lr", "not here (another learning rate"),
        ("data.num_dataset_builder_threads", "not needed here (the order of samples"),
    ],
)
def test_unknown_key(key, told):
    assert suggest(key, list_keys()).startswith(told)


def test_a_whole_command_line_of_megatron_is_translated_in_one_line(config_file):
    argv = "--tensor-model-parallel-size 2 --bf16 --swiglu --data-path 0.3 a 0.7 b --seed -1 "
    argv += "--sequence-parallel --num-experts 8 --loss-scale 1 --rope-theta 5e5 --lr=2e-4"
    with pytest.raises(InputError) as caught:
        parse_command_line(["--config", str(config_file), *argv.split()])
    message = str(caught.value)
    written = message.split("write ")[1].split("; ")[0].split()
    assert written == [
        "parallel.tensor_model_parallel_size=2",
        "precision.preset=bf16",
        "model.swiglu=true",
        "data.data_path=[0.3,a,0.7,b]",
        "train.seed=-1",
        "parallel.sequence_parallel=true",
        "model.rotary_base=5e5",
        "optimizer.lr=2e-4",
    ]
    assert "--num-experts: not here" in message and "--loss-scale: not needed here" in message
    load_config(
        config_file, [text for text in written if "seed" not in text and "data" not in text]
    )


def test_the_page_says_the_same():
    """Its list of what is called the same, and every row of what is not."""
    keys = list_keys()
    for section, names in re.findall(
        r"^\| (`[a-z]+`(?:, `[a-z]+`)?) \| `([a-z_0-9 ]+)`", PAGE, re.M
    ):
        sections = re.findall(r"[a-z]+", section)
        for name in names.split():
            assert any(f"{s}.{name}" in keys for s in sections), name
            assert megatron_advice(name) is None
    rows = re.findall(r"^\| (`--.*) \| ([^|]*) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 30
    for flags, here in rows:
        for flag in flags_in(flags):
            if find_key(flag, keys) is not None:
                continue
            advice = megatron_advice(flag)
            assert advice is not None, flag
            if flag in RENAMED:
                assert set(KEY.findall(advice)) & set(KEY.findall(here)), flag


def test_what_is_kept_free_is_not_here():
    """Names that a later version will use are refused until then, whatever their value."""
    listed = [name for names in NOT_HERE.values() for name in names]
    kept = {"context_parallel_size", "expert_model_parallel_size"}
    assert kept <= set(listed)
