"""The command line, its help and its schema tell the same story as the sections."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8lm.config import PRESETS, Config, load_config, parse_command_line
from fp8lm.config.command_line import main
from fp8lm.config.generated import schema_text
from fp8lm.config.keys import list_keys
from fp8lm.runtime.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, run_command

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "base.yaml")


def test_overrides_may_stand_on_both_sides_of_config(config_file):
    config = parse_command_line(
        ["train.seed=5", "--config", str(config_file), "train.train_iters=7"]
    )
    assert (config.train.seed, config.train.train_iters) == (5, 7)


def assert_lists(section, path, text):
    for name, key in section.model_fields.items():
        if hasattr(key.annotation, "model_fields"):  # a group of keys
            assert_lists(key.annotation, f"{path}.{name}", text)
        else:
            assert f"{path}.{name}: " in text
            assert key.description in text


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--config", "none.yaml", "--help"]])
def test_help_lists_every_key_and_exits_with_0(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(argv)
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section, field in Config.model_fields.items():
        assert_lists(field.annotation, section, text)


@pytest.mark.parametrize(
    ("path", "type_text", "default"),
    [
        ("model.num_layers", "integer >= 1", "required"),
        ("model.ffn_hidden_size", "integer >= 1 or null", "null"),
        ("model.swiglu", "true | false", "false"),
        ("precision.preset", " | ".join(PRESETS), "o3"),
        ("train.recompute_granularity", "full | selective or null", "null"),
        ("optimizer.adam_beta2", "number >= 0 and < 1", "0.95"),
        ("data.split", "text", "99,1,0"),
    ],
)
def test_key_in_words(path, type_text, default):
    key = list_keys()[path]
    assert (key.type, key.default) == (type_text, default)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "no config: pretrain_gpt.py --config FILE.yaml"),
        (["--config"], "--config: expected one argument"),
        (["--config", "x.yaml", "--train.seed=3"], "--train.seed=3: write train.seed=3"),
        (["--confg", "x.yaml"], "unknown option --confg: did you mean --config?"),
        (["--config", "x.yaml", "--train.seed", "3"], "--train.seed: write train.seed=3"),
        (["--config", "x.yaml", "--seed=3", "--eval-iters", "0"], "seed=3 train.eval_iters=0"),
        (["-c", "x.yaml"], "unknown option -c: did you mean --config?"),
        (["--config", "x.yaml", "--optimizer", "adam"], "--optimizer: not needed here"),
        (["--config", "x.yaml", "-v"], "unknown option -v: see pretrain_gpt.py --help"),
        (["--config="], "no config: pretrain_gpt.py --config FILE.yaml"),
        (["--config", "none.yaml"], "config file none.yaml does not exist"),
        (["none.yaml", "train.seed=3"], "config file none.yaml does not exist"),
        (["train.seed=3"], "no config: pretrain_gpt.py --config FILE.yaml"),
    ],
)
def test_bad_command_line(argv, complaint):
    with pytest.raises(InputError) as caught:
        parse_command_line(argv)
    assert complaint in str(caught.value)


def test_bad_input_is_one_line_and_exit_code_2(config_file, capsys):
    code = run_command(main, ["--config", str(config_file), "train.seed=x", "model.hiden_size=4"])
    out, err = capsys.readouterr()
    assert code == EXIT_BAD_INPUT
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "train.seed" in err and "model.hidden_size" in err


def test_other_failures_pass_through():
    def fail(argv):
        raise RuntimeError("a failure of the program")

    with pytest.raises(RuntimeError):
        run_command(fail, [])


def test_a_missing_package_is_one_line(capsys):
    def need(argv):
        import package_that_nobody_has.part  # noqa: F401

    assert run_command(need, []) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "has no package package_that_nobody_has: source .venv/bin/activate" in error
    assert error.count("\n") == 1

    def lost(argv):
        import fp8lm.of_former_times  # noqa: F401

    with pytest.raises(ModuleNotFoundError):  # ours: a failure of the program
        run_command(lost, [])


def test_a_config_may_stand_without_its_option(config_file):
    expected = parse_command_line(["--config", str(config_file), "train.seed=3"])
    assert parse_command_line([str(config_file), "train.seed=3"]) == expected


def test_ctrl_c_is_one_line(capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    assert run_command(interrupt, []) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_resolved_config_is_printed(config_file, capsys, tmp_path):
    assert run_command(main, ["--config", str(config_file)]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml") == load_config(config_file)


def test_schema_file_is_current(capsys):
    assert run_command(main, ["--schema"]) == 0
    assert capsys.readouterr().out == schema_text()
    current = json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8"))
    cure = "run python -m fp8lm.config --schema > configs/schema.json"
    assert current == json.loads(schema_text()), cure


def test_schema_describes_every_key_and_lets_a_file_be_partial():
    schema = json.loads(schema_text())
    sections = {name for name in schema["properties"] if name != "base"}
    assert sections == set(Config.model_fields)
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False and "required" not in section
        assert all(key["description"] for key in section["properties"].values())


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_config_files_are_valid_and_name_the_schema(path):
    load_config(path)
    first_line = path.read_text(encoding="utf-8").splitlines()[0]
    assert first_line == "# yaml-language-server: $schema=schema.json"


# FP8-LM, section 3: width, heads, layers, learning rate, tokens in a batch
@pytest.mark.parametrize(
    ("name", "sizes", "lr", "batch_tokens"),
    [
        ("gpt_125m", (768, 12, 12), 6e-4, 2**20),
        ("gpt_7b", (4096, 32, 32), 3e-4, 2**22),
        ("gpt_13b", (5120, 40, 40), 3e-4, 2**22),
        ("gpt_175b", (12288, 96, 96), 3e-5, 2**20),
    ],
)
def test_models_of_the_paper(name, sizes, lr, batch_tokens):
    config = load_config(CONFIGS / f"{name}.yaml")
    model = config.model
    assert (model.hidden_size, model.num_attention_heads, model.num_layers) == sizes
    assert config.optimizer.lr == lr
    assert config.optimizer.min_lr == pytest.approx(lr / 10)
    assert config.train.global_batch_size * model.seq_length == batch_tokens
    assert (config.scheduler.lr_decay_style, config.scheduler.lr_warmup_iters) == ("cosine", 1000)


@pytest.mark.parametrize("iters", [1, 2, 1000])
def test_gpt_tiny_trains_for_any_number_of_iterations(iters):
    config = load_config(CONFIGS / "gpt_tiny.yaml", [f"train.train_iters={iters}"])
    assert config.model.num_layers == 8 and config.model.num_attention_heads % 4 == 0
    assert config.data.mock_data
