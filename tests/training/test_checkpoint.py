"""Checkpoints in one process: bytes come back, damage is named, a failed write harms nothing."""

from __future__ import annotations

import enum
import json
import os
import pickle
import re
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch

from fp8lm.errors import InputError
from fp8lm.training.checkpoint import (
    FORMAT_VERSION,
    SaveError,
    Shard,
    latest_iteration,
    load_checkpoint,
    save_checkpoint,
)

LATEST = "latest_checkpointed_iteration.txt"
META = {"consumed_samples": 48, "config": {"lr": 1e-3}}


def make_tensors(seed=0):
    """One tensor of every stored kind, every bit pattern possible (NaNs included)."""
    generator = torch.Generator().manual_seed(seed)

    def noise(shape, dtype):
        raw = torch.randint(
            0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator
        )
        return raw.view(dtype).reshape(shape)

    return {
        "payload": noise((6, 5), torch.uint8),
        "half": noise((4, 3), torch.float16),
        "bf16": noise((7,), torch.bfloat16),
        "single": noise((2, 3, 4), torch.float32),
        "double": noise((3,), torch.float64),
        "steps": noise((1,), torch.int64),
        "scale": noise((), torch.float32),
        "empty": noise((0, 3), torch.float32),
    }


def shards_of(tensors):
    return {name: Shard.whole(tensor) for name, tensor in tensors.items()}


def load(root, tensors, **options):
    return load_checkpoint(root, shards_of(tensors), **options)


def blank(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def assert_same_bytes(actual, expected):
    for name, tensor in expected.items():
        assert (
            actual[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
        ), name


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoint 100, and its tensors."""
    tensors = make_tensors()
    save_checkpoint(tmp_path, 100, shards_of(tensors), META)
    return tmp_path, tensors


def test_every_byte_comes_back(saved):
    root, tensors = saved
    loaded = blank(tensors)
    meta = load(root, loaded)
    assert_same_bytes(loaded, tensors)
    assert meta["iteration"] == 100 and META.items() <= meta.items()
    assert meta["torch_version"] == torch.__version__


def test_layout(saved):
    root, _ = saved
    assert sorted(os.listdir(root)) == ["iter_0000100", LATEST]
    assert sorted(os.listdir(root / "iter_0000100")) == [".metadata", "__0_0.distcp", "common.json"]
    assert (root / LATEST).read_text().strip() == "100"
    assert latest_iteration(root) == 100


def test_views_and_parameters_are_filled_in_place(tmp_path):
    # A slice of a larger buffer is saved without the rest of the buffer, and filled alone.
    buffer = torch.arange(1000.0)
    save_checkpoint(tmp_path, 1, {"w": Shard.whole(buffer[10:14].view(2, 2).t())}, {})
    assert (tmp_path / "iter_0000001" / "__0_0.distcp").stat().st_size < 2000
    target = torch.nn.Parameter(torch.zeros(6))
    load_checkpoint(tmp_path, {"w": Shard.whole(target[1:5].view(2, 2))})
    assert target.tolist() == [0, 10, 12, 11, 13, 0]


def test_blocks_reshard(tmp_path):
    # Saved as rows {0-1, 2-6}, loaded as columns {0-3, 4}.
    whole = torch.arange(35, dtype=torch.int64).view(7, 5)
    save_checkpoint(tmp_path, 1, {"w": Shard.whole(whole)}, {})
    left, right = torch.zeros(7, 4, dtype=torch.int64), torch.zeros(7, 1, dtype=torch.int64)
    load_checkpoint(tmp_path, {"w": Shard(left, (7, 5), (0, 0))})
    load_checkpoint(tmp_path, {"w": Shard(right, (7, 5), (0, 4))})
    assert torch.cat((left, right), dim=1).equal(whole)


def test_blocks_that_make_no_whole_tensor_are_refused(tmp_path):
    with pytest.raises(ValueError, match="w: the ranks' blocks hold 6 elements of 8"):
        save_checkpoint(tmp_path, 1, {"w": Shard(torch.zeros(6), (8,), (2,))}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("offset", [(0,), (5, 0), (-1, 0), (0, 0, 0)])
def test_block_outside_its_tensor(offset):
    with pytest.raises(ValueError, match="does not lie inside"):
        Shard(torch.zeros(3, 4), (6, 4), offset)


def test_iterations_are_chosen_and_replaced(saved):
    root, _ = saved
    newer, replaced = make_tensors(1), make_tensors(2)
    save_checkpoint(root, 200, shards_of(newer), META)
    save_checkpoint(root, 100, shards_of(replaced), META)
    assert latest_iteration(root) == 100
    for iteration, tensors in ((100, replaced), (200, newer)):
        loaded = blank(tensors)
        assert load(root, loaded, iteration=iteration)["iteration"] == iteration
        assert_same_bytes(loaded, tensors)
    assert sorted(os.listdir(root)) == ["iter_0000100", "iter_0000200", LATEST]


def test_killed_between_the_two_renames_of_a_replacement(saved):
    root, tensors = saved
    (root / "iter_0000100").rename(root / ".iter_0000100.old")
    (root / ".iter_0000100.tmp").mkdir()
    loaded = blank(tensors)
    load(root, loaded)
    assert_same_bytes(loaded, tensors)
    save_checkpoint(root, 200, shards_of(tensors), META)
    assert sorted(os.listdir(root)) == ["iter_0000100", "iter_0000200", LATEST]


@contextmanager
def file_size_limit(num_bytes):
    """A real OSError on the write that would make a file larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# 10: the latest file or a header; 2,000: among the tensors, whose file is larger.
@pytest.mark.parametrize("num_bytes", [0, 10, 2000])
def test_failed_write_leaves_the_previous_checkpoint(saved, num_bytes):
    root, tensors = saved
    with file_size_limit(num_bytes), pytest.raises(SaveError, match="File too large") as caught:
        save_checkpoint(root, 200, shards_of(make_tensors(1)), META)
    assert "iteration 200" in str(caught.value) and "that of 100 is intact" in str(caught.value)
    assert sorted(os.listdir(root)) == ["iter_0000100", LATEST]
    loaded = blank(tensors)
    load(root, loaded)
    assert_same_bytes(loaded, tensors)


@pytest.mark.parametrize("failing", ["rename", "replace"])
def test_failure_while_publishing(saved, monkeypatch, failing):
    root, tensors = saved

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(SaveError, match="No space left on device"):
            save_checkpoint(root, 100, shards_of(make_tensors(1)), META)
    loaded = blank(tensors)
    load(root, loaded)
    assert_same_bytes(loaded, tensors)
    assert sorted(os.listdir(root)) == ["iter_0000100", LATEST]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot save checkpoints in"):
        save_checkpoint(tmp_path / "file", 1, {}, {})


def other_model(tensors, **changes):
    other = {**blank(tensors), **changes}
    return {name: tensor for name, tensor in other.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"half": torch.zeros(4, 4).half()},
            r"half: expected float16 [4, 4], found float16 [4, 3]",
        ),
        ({"half": torch.zeros(4, 3)}, "half: expected float32 [4, 3], found float16 [4, 3]"),
        ({"scale": torch.zeros(1)}, "scale: expected float32 [1], found float32 []"),
        ({"new": torch.zeros(2)}, "new: expected float32 [2], found no such tensor"),
        ({"steps": None}, "steps: expected no such tensor, found int64 [1]"),
        (
            {"half": torch.zeros(1), "new": torch.zeros(2)},
            "half: expected float32 [1], found float16 [4, 3] (and 1 more tensors)",
        ),
    ],
)
def test_checkpoint_of_another_model(saved, changes, problem):
    root, tensors = saved
    other = other_model(tensors, **changes)
    with pytest.raises(InputError, match=re.escape(f"from another model: {problem}")):
        load(root, other)
    assert not any(tensor.any() for tensor in other.values()), "loaded in part"


def test_a_part_of_a_checkpoint(saved):
    root, tensors = saved
    part = {"half": torch.zeros_like(tensors["half"])}
    load(root, part, partial=True)
    assert_same_bytes(part, {"half": tensors["half"]})
    with pytest.raises(InputError, match="new: expected"):
        load(root, {**part, "new": torch.zeros(1)}, partial=True)


def damage_latest(root):
    (root / LATEST).write_text("release\n")


def name_missing_iteration(root):
    (root / LATEST).write_text("300\n")


def drop_latest(root):
    (root / LATEST).unlink()


def truncate_tensors(root):
    path = root / "iter_0000100" / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)


def zero_tensors(root):
    path = root / "iter_0000100" / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))


def truncate_metadata(root):
    os.truncate(root / "iter_0000100" / ".metadata", 100)


def remove(name):
    def damage(root):
        (root / "iter_0000100" / name).unlink()

    damage.__name__ = f"remove_{name}"
    return damage


def set_version(version):
    def damage(root):
        path = root / "iter_0000100" / "common.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": version}))

    damage.__name__ = f"version_{version}"
    return damage


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (damage_latest, "expected the number of an iteration, found 'release'"),
        (name_missing_iteration, "no checkpoint of iteration 300"),
        (drop_latest, "no checkpoint in"),
        (shutil.rmtree, "no checkpoint in"),
        (truncate_tensors, "__0_0.distcp is truncated"),
        (zero_tensors, "__0_0.distcp is damaged at"),
        (truncate_metadata, ".metadata is unreadable or damaged"),
        (remove("__0_0.distcp"), "incomplete: no __0_0.distcp"),
        (remove(".metadata"), "incomplete: no .metadata"),
        (remove("common.json"), "incomplete: no common.json"),
        (set_version(FORMAT_VERSION + 1), f"has format version {FORMAT_VERSION + 1}"),
        (set_version("x"), "common.json is unreadable or damaged"),
    ],
)
def test_damaged_checkpoint(saved, damage, problem, capfd):
    root, tensors = saved
    damage(root)
    with pytest.raises(InputError, match=re.escape(problem)):
        load(root, blank(tensors))
    assert capfd.readouterr().err == ""


def test_no_checkpoint_yet(tmp_path):
    assert latest_iteration(tmp_path / "new") is None


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, exec])
def test_crafted_metadata_runs_nothing(saved, tmp_path, function):
    root, tensors = saved
    ran = tmp_path / "ran"
    argument = str(ran) if function is os.mkdir else f"import os; os.mkdir({str(ran)!r})"
    payload = pickle.dumps(Call(function, argument))
    pickle.loads(payload)
    ran.rmdir()  # raises unless the payload works
    (root / "iter_0000100" / ".metadata").write_bytes(payload)
    with pytest.raises(InputError, match=f"refused to load .*{function.__name__}"):
        load(root, blank(tensors))
    assert not ran.exists()


def test_metadata_with_enums_by_name(saved):
    # Python 3.11.0 to 3.11.3 pickle an enum as a call of getattr, allowed for nothing else.
    class OldPickler(pickle.Pickler):
        def reducer_override(self, value):
            if isinstance(value, enum.Enum):
                return getattr, (type(value), value.name)
            return NotImplemented

    root, tensors = saved
    path = root / "iter_0000100" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    with path.open("wb") as file:
        OldPickler(file).dump(metadata)
    assert b"getattr" in path.read_bytes()
    loaded = blank(tensors)
    load(root, loaded)
    assert_same_bytes(loaded, tensors)
    path.write_bytes(pickle.dumps(Call(getattr, torch.Size, "__new__")))
    with pytest.raises(InputError, match="refused to read the attribute '__new__'"):
        load(root, loaded)


def test_crafted_tensor_runs_nothing(saved, tmp_path):
    # The tensors are read in a restricted way too: replace the file by a pickle of the same size.
    root, tensors = saved
    path = root / "iter_0000100" / "__0_0.distcp"
    payload = pickle.dumps(Call(os.mkdir, str(tmp_path / "ran")), protocol=2)
    size = path.stat().st_size
    path.write_bytes((payload * (size // len(payload) + 1))[:size])
    with pytest.raises(InputError, match="damaged"):
        load(root, blank(tensors))
    assert not (tmp_path / "ran").exists()


def test_metadata_cannot_point_outside_the_checkpoint(saved):
    root, tensors = saved
    path = root / "iter_0000100" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for where in metadata.storage_data.values():
        where.relative_path = "../elsewhere"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"stored at .*elsewhere"):
        load(root, blank(tensors))


@pytest.mark.gpu
def test_tensors_on_a_gpu(tmp_path):
    tensors = {name: tensor.cuda() for name, tensor in make_tensors().items()}
    save_checkpoint(tmp_path, 1, shards_of(tensors), META)
    loaded = blank(tensors)
    load(tmp_path, loaded)
    assert_same_bytes(loaded, tensors)
