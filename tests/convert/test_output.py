"""An output is there whole or not at all, and a conversion goes on where it was killed."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fp8lm.checkpoint import open_checkpoint
from fp8lm.convert.hf_export import export_model, plan_export
from fp8lm.convert.hf_import import plan_import
from fp8lm.convert.output import conversion_folder, identity_of_files
from fp8lm.convert.release import import_model
from fp8lm.convert.safetensors_files import OutputTensor, SafetensorsFolder, plan_files, write_file
from fp8lm.runtime.errors import InputError, RunFailed
from tests.convert.models import FP32, LLAMA, as_bytes, save_model
from tests.training.contents import contents


def random_tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 3), "b": (7,), "c": (2, 4, 3), "d": ()}
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for (name, shape), dtype in zip(shapes.items(), kinds, strict=True)
    }


def outputs(tensors):
    return [
        OutputTensor(name, t.dtype, tuple(t.shape), lambda t=t: t.reshape(-1).split(4))
        for name, t in tensors.items()
    ]


def test_a_file_written_in_blocks_is_one_of_the_library(tmp_path):
    tensors, told = random_tensors(), []
    write_file(tmp_path / "model.safetensors", outputs(tensors), told.append)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sum(told) == sum(tensor.nbytes for tensor in tensors.values())
    reader = SafetensorsFolder(tmp_path)
    assert torch.equal(reader.read("a", 1, 3), tensors["a"][1:3])


def test_files_have_a_largest_size(tmp_path):
    tensors = outputs(random_tensors())  # of 60, 14, 48 and 1 bytes
    names = {name: [t.name for t in held] for name, held in plan_files(tensors, 62).items()}
    assert names == {
        "model-00001-of-00003.safetensors": ["a"],
        "model-00002-of-00003.safetensors": ["b", "c"],
        "model-00003-of-00003.safetensors": ["d"],
    }
    assert [*plan_files(tensors, 1000)] == ["model.safetensors"]
    assert len(plan_files(tensors, 1)) == 4  # none is cut


def test_a_folder_that_is_no_conversions_is_left_alone(tmp_path):
    (tmp_path / ".x.converting").mkdir()
    (tmp_path / ".x.converting" / "mine").touch()
    with pytest.raises(InputError, match="in the way"), conversion_folder(tmp_path / "x", {}):
        raise AssertionError
    assert [path.name for path in (tmp_path / ".x.converting").iterdir()] == ["mine"]


class Killed(Exception):
    pass


def test_another_conversion_starts_anew(tmp_path):
    output = tmp_path / "x"

    def leave(conversion, *names):
        """What was there, before it is killed having made `names`."""
        with pytest.raises(Killed), conversion_folder(output, conversion) as work:
            found = {path.name for path in work.iterdir()} - {"run.lock", "conversion.json"}
            for name in names:
                (work / name).mkdir()
            raise Killed
        assert not (work / "run.lock").exists()
        return found

    assert leave({"dtype": "bf16"}, "part") == set()
    assert leave({"dtype": "bf16"}) == {"part"}
    assert leave({"dtype": "fp32"}) == set()
    with conversion_folder(output, {"dtype": "fp32"}) as work:
        (work / "file").touch()
    assert [path.name for path in output.iterdir()] == ["file"] and not work.exists()
    with pytest.raises(InputError, match="is there already"), conversion_folder(output, {}):
        raise AssertionError


def test_a_model_that_has_changed_is_another_conversion(tmp_path):
    """Its files are not those that a killed import has read."""
    (tmp_path / "hf" / "more").mkdir(parents=True)
    file = tmp_path / "hf" / "more" / "model.safetensors"
    file.write_bytes(b"1")
    before = identity_of_files(tmp_path / "hf"), identity_of_files(file)
    assert before == (identity_of_files(tmp_path / "hf"), identity_of_files(file))
    (tmp_path / "hf" / ".x.converting").mkdir()
    (tmp_path / "hf" / ".x.converting" / "file").touch()  # an output beside it is no part of it
    assert identity_of_files(tmp_path / "hf") == before[0]
    os.utime(file, ns=(0, 1))
    for path, old in zip((tmp_path / "hf", file), before, strict=True):
        assert identity_of_files(path) != old


def test_a_full_disk_is_named_and_what_is_done_stays(tmp_path):
    output = tmp_path / "x"
    with (
        pytest.raises(RunFailed, match=f"{output} cannot be written: .*the same command goes on"),
        conversion_folder(output, {}) as work,
    ):
        (work / "part").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with conversion_folder(output, {}) as work:
        assert (work / "part").exists()


def test_two_conversions_do_not_write_the_same_output(tmp_path, run):
    folder = save_model(tmp_path / "ck", LLAMA, {"preset": "o3"})
    with conversion_folder(tmp_path / "hf", {}) as work:
        code, said = run("fp8lm", "hf", folder, tmp_path / "hf")
        error = said.splitlines()[-1]  # after what would be made
        assert code == 2 and f"--output {tmp_path / 'hf'} is in use by process" in error
        assert {path.name for path in work.iterdir()} == {"run.lock", "conversion.json"}
        (work / "file").touch()


@pytest.mark.slow
def test_a_killed_export_goes_on(tmp_path):
    checkpoint = open_checkpoint(save_model(tmp_path / "ck", LLAMA, {"preset": "o3"}))
    largest, output, written = 60_000, tmp_path / "hf", []

    def export(progress, to=output):
        export_model(plan_export(checkpoint, "fp32"), to, largest, {}, progress)

    def kill(size):
        written.append(size)
        if sum(written) > 150_000:
            raise Killed

    with pytest.raises(Killed):
        export(kill)
    assert not output.exists()
    work = tmp_path / ".hf.converting"
    done = {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert len(done) > 1 and len(list(work.glob("*.part"))) == 1
    export(lambda size: None)
    export(lambda size: None, to=tmp_path / "once")
    for path, time in done.items():
        assert (output / path.name).stat().st_mtime_ns == time
    names = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert sorted(path.name for path in output.iterdir()) == names
    for name in names:
        assert (output / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {n for n in names if n.endswith("tensors")}


@pytest.mark.parametrize("precision", [{"preset": "o3"}, FP32])
def test_a_killed_import_goes_on(tmp_path, precision):
    """File by file, to the same bytes as one that was not killed."""
    checkpoint = open_checkpoint(save_model(tmp_path / "ck", LLAMA, precision))
    dtype = None if precision == {"preset": "o3"} else "fp32"
    plan = plan_export(checkpoint, dtype)
    export_model(plan, tmp_path / "hf", 10**9, {}, lambda size: None)
    read, most = [], 200_000 if dtype else 60_000

    def bring_in(to, progress):
        import_model(plan_import(tmp_path / "hf", None), to, {}, progress, largest=20_000)

    def kill(size):
        read.append(size)
        if sum(read) > most:
            raise Killed

    with pytest.raises(Killed):
        bring_in(tmp_path / "in", kill)
    assert not (tmp_path / "in").exists()
    writing = tmp_path / ".in.converting" / "writing"
    kept = {path: path.stat().st_mtime_ns for path in writing.glob("*.distcp")}
    assert len(kept) > len(list(writing.glob(".piece_*.json"))) >= 1
    again = []
    bring_in(tmp_path / "in", again.append)
    bring_in(tmp_path / "once", lambda size: None)
    whole = sum(param.nbytes for param in plan_import(tmp_path / "hf", None).params.values())
    assert 0 < sum(again) < whole
    before, after = contents(tmp_path / "once"), contents(tmp_path / "in")
    assert after.keys() == before.keys()
    assert all(torch.equal(as_bytes(after[name]), as_bytes(before[name])) for name in after)
    assert not list((tmp_path / "in").glob("**/.piece*"))
    open_checkpoint(tmp_path / "in")
