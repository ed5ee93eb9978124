"""Flipped bits and hostile files: passed over in bounded time, with one line that says why."""

from __future__ import annotations

import os
import random
import shutil

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from fp8lm.checkpoint import DamagedCheckpoint, find_checkpoint, open_checkpoint, save_checkpoint
from fp8lm.checkpoint.metadata import tensor_entries
from fp8lm.checkpoint.reader import copy_checkpoint, read_tensor, stored_tensors
from fp8lm.runtime.errors import InputError
from tests.checkpoint.tensors import LATEST, make_tensors, shards_of
from tools.hostile import FACTS, REWRITTEN, SPECIAL, facts, flip_bit, metadata, sign

META = {
    "consumed_samples": 16,
    "batch_size": 4,
    "skipped_samples": 0,
    "rollbacks": 0,
    "losses": {"mean": 0.5, "steps": 4, "high": 0, "first": 0},
    "config": {"train": {"global_batch_size": 4}},
}
FLIPS = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    for iteration in (2, 4):
        save_checkpoint(root, iteration, shards_of(make_tensors()), META)
    return root


@pytest.fixture
def root(made, tmp_path):
    """Checkpoints 2 and 4."""
    return shutil.copytree(made, tmp_path / "ck")


def assert_passed_over(root):
    with pytest.raises(DamagedCheckpoint) as caught:
        open_checkpoint(root, 4)
    found = find_checkpoint(root, needed=META)
    assert found.iteration == 2 and len(found.passed_over) == 1
    for text in (str(caught.value), found.passed_over[0]):
        assert len(text) < 1000 and text.isprintable()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("change", REWRITTEN.values(), ids=REWRITTEN)
def test_a_rewritten_checkpoint_is_passed_over(root, change):
    change(root / "iter_0000004")
    sign(root / "iter_0000004")
    assert_passed_over(root)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("change", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_is_passed_over(root, change):
    change(root / "iter_0000004")
    assert_passed_over(root)


@pytest.mark.parametrize("name", (*FACTS, LATEST))
def test_any_flipped_bit_is_passed_over(root, name):
    rng = random.Random(7)
    path = root / name if name == LATEST else root / "iter_0000004" / name
    original = path.read_bytes()
    for _ in range(FLIPS if name != LATEST else 16):
        flip_bit(path, rng)
        found = find_checkpoint(root, needed=META)
        if name == LATEST:
            assert found.iteration in (2, 4)
        else:
            assert found.iteration == 2 and "damaged" in found.passed_over[0]
        path.write_bytes(original)


def test_random_facts_are_taken_or_passed_over(root):
    """Every fact replaced by every kind of value: none ends in anything but a valid checkpoint."""
    rng = random.Random(3)
    values = [None, True, -1, 0, 2**31, 10**30, 0.5, "", "x" * 5000, [], [[]], {}, {"a": {}}]
    original = (root / "iter_0000004" / "common.json").read_bytes()
    for _ in range(150):
        key = rng.choice([*META, "iteration", "format_version", "torch_version", "new"])
        facts(**{key: rng.choice(values)})(root / "iter_0000004")
        sign(root / "iter_0000004")
        try:
            found = find_checkpoint(root, needed=META)
            assert found.iteration in (2, 4)
        except InputError as error:  # a version that is newer is not passed over
            assert key == "format_version" and "upgrade it" in str(error)
        (root / "iter_0000004" / "common.json").write_bytes(original)


def test_unknown_facts_are_kept(root):
    facts(of_a_newer_version={"a": [1, 2, {"b": None}]})(root / "iter_0000004")
    sign(root / "iter_0000004")
    assert open_checkpoint(root).common["of_a_newer_version"] == {"a": [1, 2, {"b": None}]}


@pytest.mark.parametrize("needed", META)
def test_a_run_needs_all_its_facts(root, needed):
    facts(**{needed: None})(root / "iter_0000004")
    sign(root / "iter_0000004")
    assert find_checkpoint(root, needed=META).iteration == 2


@pytest.mark.parametrize("config", [{}, {"train": {}}, {"model": {"num_layers": 1}}])
def test_a_run_needs_the_sections_of_its_config(root, config):
    facts(config=config)(root / "iter_0000004")
    sign(root / "iter_0000004")
    assert find_checkpoint(root, needed=("config.train",)).iteration == 2


@pytest.mark.parametrize("kind", ["fifo", "device", "link", "huge", "digits", "folder"])
def test_a_latest_file_that_is_none(root, kind):
    path = root / LATEST
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("device", "link"):
        path.symlink_to(
            {"device": "/dev/zero", "link": root / "iter_0000004" / "common.json"}[kind]
        )
    else:
        path.write_text("9" * {"huge": 10**6, "digits": 4000}[kind])
    found = find_checkpoint(root)
    assert found.iteration == 4 and len(found.passed_over) == 1


def test_a_linked_folder_is_read(root, tmp_path):
    (root / "iter_0000004").rename(tmp_path / "elsewhere")
    (root / "iter_0000004").symlink_to(tmp_path / "elsewhere")
    assert find_checkpoint(root).iteration == 4


def test_flipped_bits_of_tensors_behind_right_checksums(root, tmp_path):
    """Whatever a rewritten tensor file holds, reading it ends with bytes or with one line."""
    rng, path = random.Random(5), root / "iter_0000004" / "__0_0.distcp"
    original = path.read_bytes()
    for number in range(60):
        flip_bit(path, rng)
        sign(path.parent)
        checkpoint = open_checkpoint(root, 4)
        for stored in stored_tensors(checkpoint).values():
            try:
                read_tensor(checkpoint, stored)
            except InputError as error:
                assert "is damaged at" in str(error)
        if number < 3:
            try:
                copy_checkpoint(checkpoint, tmp_path / f"copy{number}", lambda name: True, {})
            except InputError:
                assert not list((tmp_path / f"copy{number}").glob("*"))
        path.write_bytes(original)


def test_a_shape_smaller_than_the_tensor_leaves_no_rows_out(root, tmp_path):
    def shrink(found):
        stored = next(s for s in tensor_entries(found).values() if len(s.size) == 2)
        stored.size = torch.Size((1, stored.size[1]))
        stored.chunks = [ChunkStorageMetadata(torch.Size((0, 0)), stored.size)]

    metadata(shrink)(root / "iter_0000004")
    sign(root / "iter_0000004")
    with pytest.raises(InputError, match=r"damaged at .*: found \[.*\], expected \[1, "):
        copy_checkpoint(open_checkpoint(root, 4), tmp_path / "copy", lambda name: True, {})
    assert not list((tmp_path / "copy").glob("iter_*"))
