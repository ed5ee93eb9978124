"""Impossible combinations are refused with the key that is at fault; possible ones are not."""

from __future__ import annotations

import pytest

from fp8lm.config import build_config
from fp8lm.config.loading import parse_overrides
from fp8lm.config.merging import merge
from fp8lm.runtime.errors import InputError

WSD = "scheduler.lr_decay_style=WSD"
SAMPLES = ("train.train_iters=null", "train.train_samples=160")
WHAT_IF = "logging.fp8_stats_what_if=true"
HF = "tokenizer.tokenizer_type=HuggingFaceTokenizer"


def change(content, *overrides):
    # Plain overlay of keys: what merging replaces by itself must not hide what is tested here.
    for section, keys in parse_overrides(overrides).items():
        content.setdefault(section, {}).update(keys)
    return content


IMPOSSIBLE = [
    (["model.num_attention_heads=3"], "model.hidden_size = 64 is not divisible by"),
    (["model.num_query_groups=3"], "is not divisible by model.num_query_groups = 3"),
    (["model.max_position_embeddings=16"], "model.seq_length = 32 is longer than"),
    (["model.kv_channels=5"], "model.kv_channels = 5"),
    (["model.rotary_percent=0.01"], "model.rotary_percent = 0.01"),
    (["train.global_batch_size=5"], "train.global_batch_size = 5 is not divisible by"),
    (["train.train_iters=null"], "exactly one of train.train_iters"),
    (["train.train_samples=40"], "exactly one of train.train_iters"),
    ([*SAMPLES[:1], "train.train_samples=3"], "train.train_samples = 3"),
    (["train.eval_tasks_limit=5"], "name them in train.eval_tasks"),
    (["train.rampup_batch_size=[2,2,8]"], "train.train_samples"),
    ([*SAMPLES, "train.rampup_batch_size=[4,2,8]"], "does not reach train.global_batch_size = 4"),
    ([*SAMPLES, "train.rampup_batch_size=[1,2,8]"], "in steps of 2"),
    ([*SAMPLES, "train.rampup_batch_size=[1,3,8]"], "multiples of train.micro_batch_size = 2"),
    (
        ["precision.guard.action=warn", "logging.fp8_stats_interval=1", WHAT_IF],
        "precision.guard.action = warn decides from what is cast",
    ),
    (["optimizer.min_lr=1.0"], "optimizer.min_lr = 1 is greater than optimizer.lr"),
    (["scheduler.lr_warmup_init=1"], "scheduler.lr_warmup_init = 1 is greater than"),
    (["scheduler.lr_warmup_iters=10"], "scheduler.lr_warmup_iters = 10 must be less than"),
    (
        ["scheduler.lr_warmup_iters=5", "scheduler.lr_decay_iters=5"],
        "scheduler.lr_warmup_iters = 5",
    ),
    (
        ["scheduler.lr_warmup_iters=1", "scheduler.lr_warmup_fraction=0.1"],
        "give scheduler.lr_warmup_fraction = 0.1 or scheduler.lr_warmup_iters = 1",
    ),
    (["scheduler.lr_warmup_samples=4"], "scheduler.lr_warmup_samples = 4 does not fit"),
    (["scheduler.lr_decay_samples=4"], "use scheduler.lr_decay_iters"),
    ([*SAMPLES, "scheduler.lr_decay_iters=4"], "use scheduler.lr_decay_samples"),
    ([WSD], "needs scheduler.lr_wsd_decay_iters"),
    (["scheduler.lr_wsd_decay_iters=4"], "needs scheduler.lr_decay_style = WSD, not cosine"),
    (
        [WSD, "scheduler.lr_wsd_decay_iters=9", "scheduler.lr_warmup_iters=2"],
        "scheduler.lr_wsd_decay_iters = 9 and the warm-up are longer",
    ),
    (
        ["data.reset_position_ids=true", "model.position_embedding_type=none"],
        "data.reset_position_ids = true restarts positions",
    ),
    (
        ["data.reset_attention_mask=true", "model.attention_dropout=0.1"],
        "data.reset_attention_mask = true with model.attention_dropout = 0.1",
    ),
    (["data.data_path=[a]"], "data.mock_data = true reads no files"),
    (["data.mock_data=false"], "no data: set data.data_path"),
    (["data.mock_data=false", "data.data_path=[]"], "no data: set data.data_path"),
    (["data.mock_data=false", "data.data_path=[0,a,0,b]"], "all are left out"),
    (["data.mock_data=false", "data.data_path=[1e308,a,1e308,b]"], "the sum of the weights"),
    (["data.mock_data=false", "data.data_path=[1,a,b]"], "expected [prefix], [weight1"),
    (["data.mock_data=false", "data.data_path=[0.5]"], "expected [prefix], [weight1"),
    (["data.split=a,b"], 'data.split = "a,b"'),
    (["data.split=1,-1"], 'data.split = "1,-1"'),
    (["data.split=0,1,0"], 'data.split = "0,1,0"'),
    (["data.split=nan,1"], 'data.split = "nan,1"'),
    (["data.split=97,1,1,1"], "up to three shares"),
    (["tokenizer.vocab_size=null"], "NullTokenizer needs tokenizer.vocab_size"),
    (["tokenizer.tokenizer_model=a"], "NullTokenizer has no tokenizer.tokenizer_model"),
    ([HF, "tokenizer.vocab_size=null"], "HuggingFaceTokenizer needs tokenizer.tokenizer_model"),
    ([HF, "tokenizer.tokenizer_model=a"], "drop tokenizer.vocab_size = 255"),
    (["checkpoint.save_interval=5"], "checkpoint.save_interval = 5 needs checkpoint.save"),
    (["precision.gemm=bf16"], "precision.params_dtype = fp8_e4m3 needs precision.gemm = fp8"),
    (["precision.main_params_dtype=none"], "needs a master weight"),
    (["model.hidden_size=72"], "model.hidden_size = 72 is not a multiple"),
    (["model.ffn_hidden_size=100"], "model.ffn_hidden_size = 100 is not a multiple"),
    (["model.kv_channels=6"], "model.num_attention_heads * model.kv_channels = 24"),
    (
        ["model.kv_channels=4", "model.num_query_groups=1"],
        "(model.num_query_groups, model.kv_channels) = 24",
    ),
    (["model.seq_length=20"], "model.seq_length * train.micro_batch_size = 40"),
]

POSSIBLE = [
    ["model.hidden_size=72", "model.num_attention_heads=6", "precision.preset=bf16"],
    ["model.num_attention_heads=3", "model.kv_channels=32"],
    ["model.kv_channels=5", "model.position_embedding_type=none", "precision.preset=bf16"],
    ["data.reset_attention_mask=true", "model.position_embedding_type=none"],
    ["data.reset_attention_mask=true", "model.attention_dropout=0.1", "train.device=cpu"],
    [*SAMPLES, "train.rampup_batch_size=[2,2,8]", "scheduler.lr_warmup_samples=16"],
    [WSD, "scheduler.lr_wsd_decay_iters=8", "scheduler.lr_warmup_iters=2"],
    ["scheduler.lr_warmup_iters=10", "scheduler.lr_decay_iters=11"],
    ["data.mock_data=false", "data.data_path=corpus_text_document"],
    ["data.mock_data=false", "data.data_path=[1, a, 2.5, b]"],
    ["data.mock_data=false", "data.data_path=[a, b]"],
    ["data.mock_data=false", "data.data_path=[0, a, 2.5, b]"],
    ["data.mock_data=false", "data.data_path=[a]", "train.seed=4294967295"],
    ["train.seed=4294967296"],
    ["data.data_path=[a]", "data.mock_data=false", "train.seed=4294967296", "data.shuffle_seed=1"],
    ["data.split='1'"],
    [HF, "tokenizer.vocab_size=null", "tokenizer.tokenizer_model=folder"],
    ["checkpoint.save_interval=5", "checkpoint.save=folder"],
    ["precision.preset=te"],
    ["precision.preset=o1"],
    [  # blocks of weights, where ranks hold parts of the tokens that no block of 128 divides
        "precision.preset=te",
        "precision.scaling.weight=block_128x128",
        "precision.wire.gather=fp8",
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "model.hidden_size=256",
        "model.ffn_hidden_size=256",
    ],
]


@pytest.mark.parametrize(("overrides", "complaint"), IMPOSSIBLE)
def test_impossible(content, overrides, complaint):
    with pytest.raises(InputError) as caught:
        build_config(change(content, *overrides))
    assert complaint in str(caught.value)


@pytest.mark.parametrize("overrides", POSSIBLE)
def test_possible(content, overrides):
    build_config(change(content, *overrides))


def test_every_problem_is_reported_at_once(content):
    change(content, "model.num_query_groups=3", "train.global_batch_size=5", "data.split=x")
    with pytest.raises(InputError) as caught:
        build_config(content)
    for key in ("model.num_query_groups", "train.global_batch_size", "data.split"):
        assert key in str(caught.value)


def test_a_config_built_without_a_file_is_checked_too(content):
    with pytest.raises(InputError, match="is not divisible by"):
        build_config(merge(content, {"train": {"global_batch_size": 5}}))
