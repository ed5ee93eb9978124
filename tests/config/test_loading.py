"""YAML files, inheritance and overrides; every mistake in them is one `InputError`."""

from __future__ import annotations

import pytest
import yaml

from fp8lm.config import build_config, load_config
from fp8lm.config.yaml_format import ConfigDumper, ConfigLoader
from fp8lm.runtime.errors import InputError


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def test_resolved_config_loads_again_as_an_equal_one(config_file, tmp_path):
    overrides = [
        "logging.wandb_exp_name='1e3'",
        "data.data_path=[1, a, 2, on]",
        "optimizer.lr=3e-4",
    ]
    config = load_config(config_file, overrides)
    config.save_yaml(tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert config.logging.wandb_exp_name == "1e3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "resolved.yaml"]


def test_base_files_merge_in_order_and_relative_to_their_file(config_file, write):
    write("parts/adam.yaml", "optimizer: {adam_beta2: 0.98, weight_decay: 0.2}")
    write("parts/more.yaml", "base: adam.yaml\noptimizer: {weight_decay: 0.3}")
    top = write("top.yaml", "base: [config.yaml, parts/more.yaml]\noptimizer: {lr: 1}")
    optimizer = load_config(top, ["optimizer.clip_grad=2"]).optimizer
    assert (optimizer.adam_beta2, optimizer.weight_decay) == (0.98, 0.3)
    assert (optimizer.lr, optimizer.clip_grad) == (1.0, 2.0)


def test_one_base_may_be_reached_twice(config_file, write):
    write("a.yaml", "base: config.yaml")
    write("b.yaml", "base: config.yaml")
    assert load_config(write("top.yaml", "base: [a.yaml, b.yaml]")).model.num_layers == 2


def test_base_cycle(write):
    write("a.yaml", "base: sub/b.yaml")
    write("sub/b.yaml", "base: ../a.yaml")
    with pytest.raises(InputError, match=r"cycle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_config(write("a.yaml", "base: sub/b.yaml"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model:\n  num_layers: 2\n  hidden: [1,\n", r"bad\.yaml:4: not valid YAML"),
        ("model:\n\tnum_layers: 2\n", r"bad\.yaml:2: not valid YAML"),
        ("train:\n  seed: 1\n  seed: 2\n", r"bad\.yaml:3: .*key 'seed' is given twice"),
        ("- model\n", "must hold sections of keys"),
        ("base: 3\n", r"bad\.yaml: base = 3: expected a file name"),
        ("base: no.yaml\n", r"base file .*no\.yaml does not exist: named by base in .*bad\.yaml"),
        ("train: !!python/object:os.system x\n", r"bad\.yaml:1: not valid YAML"),
        ("train: &t {seed: 1}\nmodel:\n  <<: *t\n", r"bad\.yaml:3: .*merge keys .*`base`"),
        ("x: &t {}\ntrain: {<<: [*t, *t]}\n", r"bad\.yaml:2: .*merge keys"),
        ("<<: {}\n", r"bad\.yaml:1: .*merge keys"),
        ("train:\n  seed: 1\n\tlr: 2\n", r"bad\.yaml:3: .*indent with spaces"),
        ("train: {seed: 1}\n---\nmodel: {}\n", r"bad\.yaml:2: .*another document"),
        ("train: [seed, 1]\n", r'train = \["seed", 1\]: expected a section of keys'),
        ("model: {swiglu: yes}\n", 'model.swiglu = "yes": expected true'),
        ("train: {train_iters: 1_000}\n", 'train.train_iters = "1_000": expected integer'),
        ("train: {exit_duration_in_mins: 1:30}\n", '"1:30": expected number'),
        ("base: {a: 1}\n", "file name"),
        ("1: 2\n", "unknown key 1: the sections are model"),
    ],
)
def test_bad_file(write, text, complaint):
    with pytest.raises(InputError, match=complaint):
        load_config(write("bad.yaml", text))


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match=r"config file .*none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(InputError, match="cannot be read: embedded null byte"):
        load_config("a\0b.yaml")
    with pytest.raises(InputError, match="/dev/zero has more than 16 MiB: not a config"):
        load_config("/dev/zero")


SEED_7 = "base: config.yaml\ntrain: {seed: 7}\n"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\xff\xfe\x00\xd8", "is UTF-16 or UTF-32 text: save it as UTF-8"),
        (SEED_7.encode("utf-16"), "is UTF-16 or UTF-32 text"),
        (SEED_7.encode("utf-32"), "is UTF-16 or UTF-32 text"),
        (SEED_7.encode("utf-16-le"), "is not text: it has a byte of zero"),
        (b"\x80\x81", r"binary\.yaml is not UTF-8 text"),
        (b"train: {seed: 1}\0", "is not text: it has a byte of zero"),
        (b"# \x07\n", "the character U.0007 is not allowed"),
    ],
)
def test_bytes_that_are_no_text(config_file, content, complaint):
    path = config_file.with_name("binary.yaml")
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        load_config(path)


def test_a_byte_order_mark_is_passed_over(config_file):
    path = config_file.with_name("bom.yaml")
    path.write_text(SEED_7, encoding="utf-8-sig")
    assert load_config(path).train.seed == 7


def bomb(width, depth, last):
    lines = [f"a0: &a0 [{', '.join('1' * width)}]"]
    for level in range(1, depth):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join([*lines, last.format(depth - 1)])


@pytest.mark.parametrize("last", ["model: {{num_layers: *a{}}}", "*a{}: 1", "base: *a{}"])
def test_aliases_that_multiply_are_refused_at_once(write, last):
    with pytest.raises(InputError, match="more than 200000 values"):
        load_config(write("bad.yaml", bomb(10, 30, last)))


def test_a_chain_of_aliases_is_refused(write):
    """Each only twice as large as the last, and deeper than the interpreter's stack."""
    lines = ["a0: &a0 [1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 3000))]
    with pytest.raises(InputError, match=r"bad\.yaml.*not valid YAML"):
        load_config(write("bad.yaml", "\n".join(lines)))


def test_aliases_of_values_are_read(config_file, write):
    top = write("top.yaml", "base: config.yaml\ntrain: {seed: &s 3}\nmodel: {num_layers: *s}\n")
    assert load_config(top).model.num_layers == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("6E-5", 6e-5),
        ("1", 1.0),
        (".5", 0.5),
        ("+1.e-2", 0.01),
    ],
)
def test_numbers_of_yaml_1_2(config_file, write, text, value):
    assert load_config(config_file, [f"optimizer.lr={text}"]).optimizer.lr == value
    top = write("top.yaml", f"base: config.yaml\noptimizer:\n  lr: {text}\n")
    assert load_config(top).optimizer.lr == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0x10", 16),
        ("0o10", 8),
        ("on", "on"),
        ("2026-11-23", "2026-11-23"),
        ("12:30", "12:30"),
        ("99,1,0", "99,1,0"),
        ("", None),
        ("~", None),
        ("true", True),
        ("no", "no"),
    ],
)
def test_scalars_of_yaml_1_2(text, value):
    assert yaml.load(text, Loader=ConfigLoader) == value


@pytest.mark.parametrize("text", ["1e3", "on", "010", "0o7", "1:30", "null", "2026-11-23", "", "a"])
def test_dumped_text_is_text_to_both_yaml_versions(text):
    dumped = yaml.dump({"key": text}, Dumper=ConfigDumper)
    assert yaml.load(dumped, Loader=ConfigLoader) == yaml.safe_load(dumped) == {"key": text}


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.seed", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("train.=3", "write it as section.key=value"),
        ("data.data_path=[1, a", "not a YAML value"),
        ("train.sed=3", r"unknown key train\.sed: did you mean train\.seed\?"),
        ("seed=3", r"unknown key seed: did you mean train\.seed\?"),
        ("train.seed.x=3", r"train\.seed = {\"x\": 3}: expected integer >= 0"),
        ("base=other.yaml", "unknown key base: write it into a file"),
        ("train.seed:3", "write train.seed=3"),
        ("more.yaml", "one config is read"),
        ("seed", "train.seed=VALUE"),
        ("swiglu", "model.swiglu=true"),
        ("train-seed=3", r"unknown key train-seed: did you mean train\.seed\?"),
        ("train.Seed=3", r"did you mean train\.seed\?"),
        ("TRAIN.SEED=3", "unknown key TRAIN: did you mean train"),
    ],
)
def test_bad_override(config_file, override, complaint):
    with pytest.raises(InputError, match=complaint):
        load_config(config_file, [override])


@pytest.mark.parametrize(
    "words",
    [
        "train.seed 3",
        "train.seed =3",
        "train.seed= 3",
        "train.seed = 3",
        "train.seed : 3",
        "train.seed: 3",
        "seed 3",
        "train-seed 3",
    ],
)
def test_a_value_that_stands_apart(config_file, words):
    with pytest.raises(InputError, match=r"write train\.seed=3\b"):
        load_config(config_file, words.split())


def test_override_below_a_value(config_file):
    with pytest.raises(InputError, match="train was given"):
        load_config(config_file, ["train=3", "train.seed=3"])


def test_later_override_wins(config_file):
    assert load_config(config_file, ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize(
    ("overrides", "section", "expected"),
    [
        (["train.train_samples=40"], "train", {"train_iters": None, "train_samples": 40}),
        (["data.data_path=[a]"], "data", {"mock_data": False, "data_path": ("a",)}),
        (["data.data_path=a"], "data", {"mock_data": False, "data_path": ("a",)}),
        (["data.mock_data=true"], "data", {"mock_data": True, "data_path": None}),
        (["scheduler.lr_warmup_iters=0"], "scheduler", {"lr_warmup_fraction": None}),
        (["scheduler.lr_decay_iters=5"], "scheduler", {"lr_warmup_fraction": 0.1}),
        (
            ["tokenizer.tokenizer_type=TikTokenizer", "tokenizer.tokenizer_model=m"],
            "tokenizer",
            {"tokenizer_model": "m", "vocab_size": None},
        ),
        (["tokenizer.tokenizer_type=NullTokenizer"], "tokenizer", {"vocab_size": 255}),
    ],
)
def test_later_choice_replaces_its_alternatives(config_file, write, overrides, section, expected):
    top = write("top.yaml", "base: config.yaml\nscheduler: {lr_warmup_fraction: 0.1}")
    result = getattr(load_config(top, overrides), section)
    assert {key: getattr(result, key) for key in expected} == expected


def test_alternatives_in_one_layer_contradict(config_file):
    with pytest.raises(InputError, match="exactly one of train"):
        load_config(config_file, ["train.train_iters=1", "train.train_samples=40"])


def test_another_preset_replaces_what_a_resolved_config_wrote_out(content, config_file, tmp_path):
    load_config(config_file, ["precision.exp_avg_dtype=bf16"]).save_yaml(tmp_path / "o3.yaml")
    precision = load_config(tmp_path / "o3.yaml", ["precision.preset=te"]).precision
    assert precision.exp_avg_dtype == "bf16"  # chosen, not filled in by o3
    expected = build_config({**content, "precision": {"preset": "te", "exp_avg_dtype": "bf16"}})
    assert precision == expected.precision
