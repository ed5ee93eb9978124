"""Damaged, foreign and malicious checkpoints: each one clear message, and nothing is filled."""

from __future__ import annotations

import enum
import json
import os
import pickle
import re
import tempfile

import pytest
import torch

from fp8lm.checkpoint import (
    check_save_folder,
    find_checkpoint,
    latest_iteration,
    open_checkpoint,
    save_checkpoint,
)
from fp8lm.checkpoint.checksums import CHECKSUMS
from fp8lm.checkpoint.facts import FORMAT_VERSION
from fp8lm.checkpoint.files import write_latest
from fp8lm.runtime.errors import InputError
from tests.checkpoint.tensors import (
    LATEST,
    META,
    assert_same_bytes,
    blank,
    load,
    make_tensors,
    shards_of,
)
from tools.hostile import sign


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
    load(root, part, ignore_prefix="")
    assert_same_bytes(part, {"half": tensors["half"]})
    with pytest.raises(InputError, match="new: expected"):
        load(root, {**part, "new": torch.zeros(1)}, ignore_prefix="")


FILES = ("__0_0.distcp", ".metadata", "common.json", CHECKSUMS)


def truncate(name):
    def damage(folder):
        os.truncate(folder / name, (folder / name).stat().st_size - 1)

    damage.__name__ = f"truncate {name}"
    return damage


def zero(name):
    def damage(folder):
        (folder / name).write_bytes(bytes((folder / name).stat().st_size))

    damage.__name__ = f"zero {name}"
    return damage


def flip(name, where):
    """One bit, at a share of the file."""

    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[int(where * (len(content) - 1))] ^= 4
        (folder / name).write_bytes(content)

    damage.__name__ = f"flip {name} at {where}"
    return damage


def delete(name):
    def damage(folder):
        (folder / name).unlink()

    damage.__name__ = f"delete {name}"
    return damage


def set_version(version):
    def damage(folder):
        common = json.loads((folder / "common.json").read_text())
        (folder / "common.json").write_text(json.dumps({**common, "format_version": version}))
        sign(folder)

    damage.__name__ = f"version {version}"
    return damage


DAMAGES = [
    *((truncate(name), "truncated|damaged") for name in FILES),
    *((zero(name), "damaged") for name in FILES),
    *((delete(name), f"is incomplete: no {re.escape(name)}") for name in FILES),
    *(
        (flip(name, where), "damaged|refused|newer|version")
        for name in FILES
        for where in (0.1, 0.6)
    ),
    (set_version("x"), "common.json is damaged"),
]


@pytest.mark.parametrize(
    ("damage", "problem"), DAMAGES, ids=lambda value: getattr(value, "__name__", "")
)
def test_damage_is_named_and_passed_over(saved, damage, problem, capfd):
    root, tensors = saved
    damage(root / "iter_0000100")
    with pytest.raises(InputError, match=f"no valid checkpoint in .*iteration 100: .*({problem})"):
        load(root, blank(tensors))
    older = make_tensors(1)
    save_checkpoint(root, 50, shards_of(older), META)
    write_latest(root, 100)
    found = open_checkpoint(root)
    assert found.iteration == 50
    assert re.search(f"iteration 100: .*({problem})", found.passed_over[0])
    loaded = blank(older)
    load(root, loaded)
    assert_same_bytes(loaded, older)
    assert capfd.readouterr().err == ""


def test_a_damaged_one_that_was_asked_for_is_not_passed_over(saved):
    root, tensors = saved
    save_checkpoint(root, 200, shards_of(tensors), META)
    flip("__0_0.distcp", 0.5)(root / "iter_0000200")
    with pytest.raises(InputError, match=r"__0_0.distcp is damaged: its SHA-256 differs"):
        open_checkpoint(root, 200)
    assert open_checkpoint(root, 100).iteration == 100


@pytest.mark.parametrize(
    ("text", "iteration", "problem"),
    [
        ("release\n", 200, "expected the number of an iteration, found 'release'"),
        ("300\n", 200, "iteration 300, named by latest_checkpointed_iteration.txt: no such folder"),
        ("", 200, "expected the number of an iteration, found ''"),
        (None, 200, None),
        ("100", 100, None),  # someone went back by hand
    ],
)
def test_the_latest_file(saved, text, iteration, problem):
    root, tensors = saved
    save_checkpoint(root, 200, shards_of(tensors), META)
    (root / LATEST).unlink()
    if text is not None:
        (root / LATEST).write_text(text)
    found = open_checkpoint(root)
    assert found.iteration == iteration
    assert [problem in text for text in found.passed_over] == ([True] if problem else [])


def test_a_name_that_leads_nowhere_is_passed_over(saved):
    root, _ = saved
    (root / "iter_0000200").symlink_to(root / "gone")
    (root / "iter_0000300").write_text("")
    (root / LATEST).write_text("300")
    found = find_checkpoint(root)
    assert found.iteration == 100
    assert [text.split(": ")[0] for text in found.passed_over] == ["iteration 300", "iteration 200"]


def test_a_renamed_folder_is_passed_over(saved):
    root, tensors = saved
    save_checkpoint(root, 150, shards_of(tensors), META)
    (root / "iter_0000150").rename(root / "iter_0000200")
    (root / LATEST).write_text("200")
    found = find_checkpoint(root)
    assert found.iteration == 100
    assert "holds iteration 150: " in found.passed_over[0]


def test_only_what_is_named_is_passed_over(saved):
    root, tensors = saved
    part = {name: torch.zeros_like(t) for name, t in tensors.items() if name != "half"}
    load(root, part, ignore_prefix="hal")
    with pytest.raises(InputError, match="half: expected no such tensor"):
        load(root, part, ignore_prefix="other.")


def test_a_latest_file_and_no_checkpoint(tmp_path):
    (tmp_path / LATEST).write_text("7")
    with pytest.raises(InputError, match=r"no valid checkpoint in .*iteration 7, named by"):
        find_checkpoint(tmp_path)


def test_a_newer_format_is_refused_and_not_passed_over(saved):
    root, tensors = saved
    save_checkpoint(root, 200, shards_of(tensors), META)
    set_version(FORMAT_VERSION + 1)(root / "iter_0000200")
    with pytest.raises(InputError, match=f"has format version {FORMAT_VERSION + 1}.*upgrade it"):
        find_checkpoint(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone without permission")
@pytest.mark.parametrize("name", FILES)
def test_a_file_without_permission_is_not_called_damaged(name):
    nobody = 65534
    with tempfile.TemporaryDirectory() as root:
        save_checkpoint(root, 1, shards_of(make_tensors()), META)
        os.chmod(root, 0o755)
        os.chmod(f"{root}/iter_0000001/{name}", 0o600)
        os.seteuid(nobody)
        try:
            with pytest.raises(InputError, match=f"{re.escape(name)} cannot be read.*denied"):
                find_checkpoint(root)
            with pytest.raises(InputError, match="no permission to write in"):
                check_save_folder(root)
        finally:
            os.seteuid(0)


def test_no_checkpoint_yet(tmp_path):
    assert latest_iteration(tmp_path / "new") is None
    assert find_checkpoint(tmp_path / "new") is None
    with pytest.raises(InputError, match=r"no checkpoint in .*new\b"):
        open_checkpoint(tmp_path / "new")
    with pytest.raises(InputError, match="no checkpoint of iteration 3 in"):
        open_checkpoint(tmp_path, 3)


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
    sign(root / "iter_0000100")
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
    sign(path.parent)
    assert b"getattr" in path.read_bytes()
    loaded = blank(tensors)
    load(root, loaded)
    assert_same_bytes(loaded, tensors)
    path.write_bytes(pickle.dumps(Call(getattr, torch.Size, "__new__")))
    sign(path.parent)
    with pytest.raises(InputError, match="refused to read the attribute '__new__'"):
        load(root, loaded)


def test_crafted_tensor_runs_nothing(saved, tmp_path):
    # The tensors are read in a restricted way too: replace the file by a pickle of the same size.
    root, tensors = saved
    path = root / "iter_0000100" / "__0_0.distcp"
    payload = pickle.dumps(Call(os.mkdir, str(tmp_path / "ran")), protocol=2)
    size = path.stat().st_size
    path.write_bytes((payload * (size // len(payload) + 1))[:size])
    sign(path.parent)
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
    sign(path.parent)
    with pytest.raises(InputError, match=r"stored at .*elsewhere"):
        load(root, blank(tensors))
