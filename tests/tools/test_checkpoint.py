"""tools/checkpoint.py on a checkpoint of several shards: shown, checked, compared, rewritten."""

from __future__ import annotations

import os

import pytest
import torch

from fp8lm.checkpoint import Shard, open_checkpoint, save_checkpoint
from fp8lm.checkpoint.reader import differences, read_tensor, stored_tensors
from fp8lm.runtime.lock_file import NAME
from fp8lm.runtime.run_lock import RunFolder, RunLocks
from tests.checkpoint.tensors import assert_same_bytes, file_size_limit

LOSSES = {"mean": 0.5, "steps": 1, "high": 0, "first": 0}
META = {"consumed_samples": 48, "losses": LOSSES, "config": {"precision": {"preset": "o3"}}}


def tensors(changed=False):
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (6, 4), dtype=torch.uint8, generator=generator)
    if changed:
        codes[4, 1] ^= 0x80
    return {
        "model.w.payload": codes.view(torch.float8_e4m3fn),
        "model.w.scale": torch.tensor(0.5),
        "optimizer.master.w.payload": torch.randn(6, 4, generator=generator).half(),
        "optimizer.num_steps": torch.tensor(9),
    }


def in_blocks(whole):
    """Matrices as two blocks of rows."""
    return {
        name: [Shard(tensor[:3], (6, 4), (0, 0)), Shard(tensor[3:], (6, 4), (3, 0))]
        if tensor.ndim
        else [Shard.whole(tensor)]
        for name, tensor in whole.items()
    }


@pytest.fixture
def root(tmp_path):
    save_checkpoint(tmp_path / "a", 10, in_blocks(tensors()), META)
    save_checkpoint(tmp_path / "a", 20, in_blocks(tensors()), META)
    return tmp_path / "a"


@pytest.fixture
def look(run_tool, capsys):
    """Exit code, output and complaints of one call of the tool."""

    def run(*argv):
        capsys.readouterr()
        code = run_tool("checkpoint", *argv)
        return code, *capsys.readouterr()

    return run


def damage(folder):
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_list_and_verify(look, root):
    code, out, _ = look("list", root)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["10", "20"]
    assert out.splitlines()[2].endswith("valid, latest")
    assert look("verify", root)[:2] == (
        0,
        "iteration 10: valid\niteration 20: valid\n",
    )
    damage(root / "iter_0000020")
    code, out, _ = look("verify", root)
    assert code == 1
    assert "iteration 10: valid" in out and "__0_0.distcp is damaged" in out
    assert look("verify", root / "iter_0000010")[0] == 0
    code, out, _ = look("list", root / "iter_0000010")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == ["10"]


def test_list_while_a_checkpoint_goes_away(look, root):
    (root / "iter_0000030").symlink_to(root / "gone")
    code, out, _ = look("list", root)
    assert code == 0
    state = f"what has its name in {root} is no folder"
    assert out.splitlines()[3].split() == ["30", "0", "0", *state.split()]


def test_inspect(look, root):
    code, out, _ = look("inspect", root)
    assert code == 0
    assert "  iteration: 20\n" in out and "  losses:\n    mean: 0.5\n" in out
    assert not set("{}[]") & set(out.partition("  precision: ")[0]) and "  precision: o3\n" in out
    assert "  model: 1 payloads, 24 elements in float8_e4m3fn, 24 bytes\n" in out
    assert "  optimizer.master: 1 payloads, 24 elements in float16, 48 bytes\n" in out
    assert look("inspect", root, "--tensors", "model.*")[1] == (
        "model.w.payload: float8_e4m3fn [6, 4], scale 0.5\nmodel.w.scale: float32 [] = 0.5\n"
    )
    assert look("inspect", root, "--config")[1] == "precision:\n  preset: o3\n"


def test_inspect_passes_over_what_is_damaged(look, root):
    damage(root / "iter_0000020")
    code, out, err = look("inspect", root)
    assert code == 0 and "  iteration: 10\n" in out
    assert err.startswith("warning: passed over iteration 20: ")


def test_compare_names_the_first_element_that_differs(look, root, tmp_path):
    save_checkpoint(tmp_path / "b", 20, in_blocks(tensors()), META | {"config": {}})
    code, out, _ = look("compare", root, tmp_path / "b")
    assert code == 0 and out.startswith("equal: 4 tensors")
    other = tensors(changed=True) | {"optimizer.num_steps": torch.tensor(8)}
    save_checkpoint(tmp_path / "b", 21, in_blocks(other), META)
    one, two = open_checkpoint(root), open_checkpoint(tmp_path / "b")
    code = tensors()["model.w.payload"].view(torch.uint8)[4, 1].item()
    iteration, payload, steps = differences(one, two)
    assert iteration == "iteration: 20 and 21"
    assert payload.startswith("model.w.payload: 1 of 24 ") and "[4, 1]" in payload
    assert payload.endswith(f"0x{code:02x} and 0x{code ^ 0x80:02x}")
    assert steps.startswith("optimizer.num_steps: 1 of 1 ")
    assert steps.endswith("0x0000000000000009 and 0x0000000000000008")
    assert look("compare", root, tmp_path / "b")[0] == 1


def test_release_and_merge(look, root, tmp_path):
    assert look("release", root, tmp_path / "model")[0] == 0
    released = open_checkpoint(tmp_path / "model")
    assert list(stored_tensors(released)) == ["model.w.payload", "model.w.scale"]
    assert released.common["released"] and released.common["consumed_samples"] == 48
    assert look("merge", root, tmp_path / "one")[0] == 0
    merged = open_checkpoint(tmp_path / "one")
    assert not list(differences(open_checkpoint(root), merged))
    found = {name: read_tensor(merged, stored) for name, stored in stored_tensors(merged).items()}
    assert_same_bytes(found, tensors())


def test_bad_input(look, root, tmp_path):
    code, out, err = look("inspect", tmp_path / "nothing")
    assert (code, out) == (2, "") and err.startswith("error: no checkpoint in ")
    assert look("list", tmp_path)[0] == 2
    assert look("inspect", root / "iter_0000030")[0] == 2
    before = sorted(path.name for path in root.iterdir())
    assert look("release", root, root)[0] == 2
    output, locks = tmp_path / "of a run", RunLocks()
    locks.take([RunFolder(str(output), "a", "b")])
    code, _, complaint = look("merge", root, output)
    assert code == 2 and f"process {os.getpid()} " in complaint
    assert [path.name for path in output.iterdir()] == [NAME]
    locks.release()
    assert look("merge", root, output)[0] == 0 and not (output / NAME).exists()
    assert sorted(path.name for path in root.iterdir()) == before
    with file_size_limit(100):
        code, _, err = look("merge", root, tmp_path / "full")
    assert code == 2 and "there is none before it" in err
