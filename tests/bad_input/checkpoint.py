"""Checkpoints: missing, damaged, of another model, and folders that cannot be written."""

from __future__ import annotations

import json
import os

import torch

from fp8lm.checkpoint import Shard, save_checkpoint
from fp8lm.checkpoint.checksums import CHECKSUMS, checksums_text, file_digest
from tests.bad_input.cases import run, train, writes

LOAD = "checkpoint.load=ck"
WEIGHTS = "checkpoint.pretrained=ck"
STRICT = ("checkpoint.exit_on_missing_checkpoint=true", "checkpoint.save=ck", LOAD)
META = {
    "iteration": 1,
    "consumed_samples": 16,
    "batch_size": 16,
    "skipped_samples": 0,
    "rollbacks": 0,
    "losses": {"mean": 0.0, "steps": 0, "high": 0, "first": 0},
    "config": {"model": {"num_layers": 1}, "train": {"global_batch_size": 16}},
}


def saved(change=lambda folder: None, **meta):
    """One checkpoint of a model of one scalar in ck/, and what is wrong with it."""

    def prepare(folder):
        shards = {"model.w": [Shard.whole(torch.zeros(()))]}
        change(save_checkpoint(folder / "ck", 1, shards, META | meta))

    return prepare


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def remove(name):
    return lambda folder: (folder / name).unlink()


def flip(name):
    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return change


def newer(folder):
    common = json.loads((folder / "common.json").read_text())
    (folder / "common.json").write_text(json.dumps({**common, "format_version": 99}))
    digests = {p.name: file_digest(p) for p in folder.iterdir() if p.name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(checksums_text(digests))


def latest(text):
    return lambda folder: (folder.parent / "latest_checkpointed_iteration.txt").write_text(text)


def replaced(folder):
    """The latest file names an iteration of which there is no folder, nor any other."""
    folder.rename(folder.parent / "something")


def a_file(folder):
    (folder / "ck").write_text("")


def a_link_to_nowhere(folder):
    (folder / "ck").symlink_to("nowhere")


def not_of_chaos(folder):
    (folder / "ck" / "undisturbed").mkdir(parents=True)
    (folder / "ck" / "undisturbed" / "thesis.txt").write_text("")


def of_32_tokens(folder):
    """A checkpoint of one table."""
    identity = {"tokenizer_type": "NullTokenizer", "vocab_size": 32}
    facts = {"tokenizer": {"identity": identity, "files": []}}
    table = Shard.whole(torch.zeros(32, 64).bfloat16())
    shards = {"model.embedding.word_embeddings.weight.payload": [table]}
    save_checkpoint(folder / "ck", 1, shards, META | facts)


SAVE = "checkpoint.save=new"
NONE = "no valid checkpoint in ck: "
FILE = "__0_0.distcp"
CASES = [
    train(LOAD, says="a checkpoint from another model: ", prepare=saved()),
    train(LOAD, says=("ck", "config.model"), prepare=saved(config={})),
    train(LOAD, says=("release", "optimizer states"), prepare=saved(released=True)),
    train(LOAD, says=(NONE, f"{FILE} is truncated"), prepare=saved(cut(FILE))),
    train(LOAD, says=(NONE, f"{FILE} is damaged: its SHA-256"), prepare=saved(flip(FILE))),
    train(LOAD, says=(NONE, f"is incomplete: no {FILE}"), prepare=saved(remove(FILE))),
    train(
        LOAD,
        says=(NONE, "Megatron-LM's look so: tools/convert_checkpoint.py"),
        prepare=writes(
            **{"ck/iter_0000005/common__pt": "", "ck/latest_checkpointed_iteration__txt": "5"}
        ),
    ),
    train(LOAD, says=(NONE, ".metadata is damaged"), prepare=saved(cut(".metadata"))),
    train(LOAD, says=(NONE, "is incomplete: no .metadata"), prepare=saved(remove(".metadata"))),
    train(LOAD, says=(NONE, "common.json is damaged"), prepare=saved(cut("common.json"))),
    train(LOAD, says=(NONE, "no common.json"), prepare=saved(remove("common.json"))),
    train(LOAD, says=(NONE, f"{CHECKSUMS} is damaged"), prepare=saved(cut(CHECKSUMS))),
    train(LOAD, says=(NONE, f"no {CHECKSUMS}"), prepare=saved(remove(CHECKSUMS))),
    train(LOAD, says="has format version 99, written by fp8lm", prepare=saved(newer)),
    train(LOAD, says="no such folder", prepare=saved(replaced)),
    train("checkpoint.save=ck", says="checkpoints in ck", prepare=a_file),
    train("checkpoint.save=ck", says="up to iteration 1", prepare=saved()),
    train("checkpoint.save=ck", says=("ck", "nowhere"), prepare=a_link_to_nowhere),
    train("logging.dir=ck", says=("logging.dir=ck", "nowhere"), prepare=a_link_to_nowhere),
    train("checkpoint.save=ck/in", says="cannot save checkpoints in ck/in", prepare=a_file),
    train("logging.dir=ck", says="logging.dir=ck cannot be written to", prepare=a_file),
    train(WEIGHTS, SAVE, says=("checkpoint.pretrained = ck", "not exist")),
    train("checkpoint.pretrained=ckk", says="did you mean ck?", prepare=saved()),
    train("checkpoint.pretrained=ck/iter_0000002", says="does not exist", prepare=saved()),
    train(WEIGHTS, says="a Hugging Face model", prepare=writes(**{"ck/model__safetensors": ""})),
    train(WEIGHTS, SAVE, says=("checkpoint.pretrained = ck", "num_layers"), prepare=saved()),
    train(
        WEIGHTS,
        SAVE,
        says=("checkpoint.pretrained = ck", FILE, "truncated"),
        prepare=saved(cut(FILE)),
    ),
    train(
        WEIGHTS,
        says=("checkpoint.pretrained = ck", "checkpoint.extend_embeddings=true"),
        prepare=of_32_tokens,
    ),
    train(
        WEIGHTS,
        SAVE,
        "tokenizer.vocab_size=15",
        "checkpoint.allow_tokenizer_change=true",
        says=("checkpoint.pretrained = ck", "cannot be cut"),
        prepare=of_32_tokens,
    ),
    run("generate", "--load", "ck", "--prompt", "1", says="no checkpoint in ck"),
    run("checkpoint", "list", "ck", says="no checkpoint in ck"),
    run("checkpoint", "inspect", "ck", says=("in ck: ", "not exist")),
    run("generate", "--load", "$NO", "--prompt", "1", says="--load: $NO"),
    run("checkpoint", "verify", "$NO/ck", says="folder: $NO/ck"),
    run("checkpoint", "list", "ckk", says="in ckk: it does not exist: did", prepare=saved()),
    train(LOAD, says=("checkpoint.load = ck", "not exist")),
    train(LOAD, "checkpoint.save=other", says=("checkpoint.load = ck", "not exist")),
    train("checkpoint.load=ckk", says="did you mean ck?", prepare=saved()),
    train(LOAD, says="a Hugging Face model", prepare=writes(**{"ck/model__safetensors": ""})),
    train("checkpoint.load=ck/iter_0000002", says="does not exist", prepare=saved()),
    train(*STRICT, says="no checkpoint in checkpoint.load = ck"),
    train(STRICT[0], says="needs checkpoint.load"),
    train(
        "checkpoint.save=ck",
        "checkpoint.load=ck/iter_0000001",
        says=("ck/iter_0000001 is one checkpoint", "save elsewhere"),
        prepare=saved(),
    ),
    train("checkpoint.save=ck/iter_0000001", says="ck/iter_0000001", prepare=saved()),
    train("logging.dir=ck/iter_0000001", says="ck/iter_0000001", prepare=saved()),
    train("logging.dir=ck/iter_0000001/logs", says="ck/iter_0000001/logs", prepare=saved()),
    run("checkpoint", "inspect", "ck/iter_0000009", says="of iteration 9", prepare=saved()),
    run("checkpoint", "verify", "nowhere", says="no checkpoint in nowhere"),
    run("checkpoint", "compare", "ck", "nowhere", says="in nowhere", prepare=saved()),
    run(
        "checkpoint",
        "release",
        "ck",
        "a/b",
        says=("iteration 1", "a/b"),
        prepare=lambda f: (saved()(f), (f / "a").write_text("")),
    ),
    run("checkpoint", "release", "ck", "ck", says="ck holds checkpoints", prepare=saved()),
    run(
        "checkpoint",
        "merge",
        "ck",
        "other",
        says=("other", "(.iter_0000009.tmp)", "name a folder"),
        prepare=lambda f: (saved()(f), (f / "other/.iter_0000009.tmp").mkdir(parents=True)),
    ),
    run("checkpoint", "list", "ck/iter_0000009", says="no checkpoint ck/it", prepare=saved()),
    run("checkpoint", "verify", "ck/iter_0000009", says="no checkpoint ck/it", prepare=saved()),
    run(
        "checkpoint",
        "inspect",
        "ck",
        "--config",
        says="nothing of the config",
        prepare=saved(config={}),
    ),
    run("chaos", "--folder", "ck", says="holds something else", prepare=not_of_chaos),
    run("compare_runs", "a=nowhere", says="nowhere"),
    run("compare_runs", "nowhere", says="NAME=FOLDER"),
]
