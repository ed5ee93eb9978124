"""wandb with its real package and no server: identity across starts, config, failures."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import pytest

from fp8lm.config import LoggingConfig
from fp8lm.metrics.logger import RunInfo, TrainLogger
from fp8lm.metrics.wandb_run import RunRecord
from tests.metrics.reports import VALUES

pytestmark = pytest.mark.slow

KEY = "0123456789abcdef0123456789abcdef01234567"  # the form of a key, and nobody's


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """No key, no home, no network of the person who runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def start(folder, first=0, seed=1, error=None, facts=None, **keys):
    """One start of a run that logs two iterations and ends, in `error` if that is given."""
    keys = {"wandb_project": "project", "wandb_mode": "offline", **keys}
    config = LoggingConfig(dir=str(folder), tensorboard=False, **keys)
    run = RunInfo(1000, first, config={"train": {"seed": seed}}, facts=facts or {})
    try:
        with TrainLogger(config, run, io.StringIO()) as logger:
            for iteration in (first + 10, first + 20):
                logger.log_step({**VALUES, "iteration": iteration})
            if error is not None:
                raise error
    except RuntimeError:
        pass
    return json.loads((folder / "wandb_run.json").read_text())


def stored(folder):
    """All bytes that wandb kept of its runs, and the id of each start."""
    import wandb

    wandb.teardown()  # its own process writes the files, at the latest when it ends
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    return b"".join(file.read_bytes() for file in files), [
        file.stem.removeprefix("run-") for file in files
    ]


RECORD = RunRecord("", "project", None, "digest", finished=False)


@pytest.mark.parametrize(
    ("former", "resumed", "continues"),
    [
        ({"finished": True}, True, True),  # from a checkpoint
        ({"finished": True, "config": "other"}, True, True),  # from a checkpoint, another lr
        ({}, False, True),  # killed before the first checkpoint
        ({"config": "other"}, False, False),  # killed, then another config
        ({"finished": True}, False, False),  # the same training once more
        ({"project": "other"}, True, False),
        ({"entity": "team"}, True, False),
    ],
)
def test_which_starts_continue_a_run(former, resumed, continues):
    assert replace(RECORD, id="abc", **former).continues(RECORD, resumed) is continues


def test_a_run_keeps_its_id_across_starts(tmp_path):
    first = start(tmp_path, error=RuntimeError("before the first checkpoint"))
    again = start(tmp_path, first=0)
    resumed = start(tmp_path, first=20)
    anew = start(tmp_path)
    assert [first["finished"], again["finished"]] == [False, True]
    assert first["id"] == again["id"] == resumed["id"] != anew["id"]
    _, ids = stored(tmp_path)
    assert sorted(ids) == sorted([first["id"]] * 3 + [anew["id"]])


def test_what_wandb_keeps(tmp_path):
    facts = {"git": {"commit": "0123abc", "branch": "trunk", "dirty": True}}
    keys = {"wandb_group": "group-of-seeds", "wandb_tags": ["tag-one"], "wandb_entity": "team"}
    start(tmp_path, facts=facts, seed=4711, wandb_exp_name="run-name", **keys)
    kept, _ = stored(tmp_path)
    for text in ("lm loss", "params-norm", "4711", "0123abc", "trunk", "run-name"):
        assert text.encode() in kept, text
    for text in ("group-of-seeds", "tag-one", "team"):
        assert text.encode() in kept, text


def test_iterations_done_again_are_kept(tmp_path):
    config = LoggingConfig(
        dir=str(tmp_path), tensorboard=False, wandb_project="project", wandb_mode="offline"
    )
    with TrainLogger(config, RunInfo(1000), io.StringIO()) as logger:
        for iteration, loss in ((10, 3.125), (20, 9.375), (15, 2.625)):
            logger.log_step({**VALUES, "iteration": iteration, "lm loss": loss})
    kept, _ = stored(tmp_path)
    assert all(loss in kept for loss in (b"3.125", b"9.375", b"2.625"))


def test_save_dir_takes_wandbs_files_and_not_the_id(tmp_path):
    record = start(tmp_path / "run", wandb_save_dir=str(tmp_path / "elsewhere"))
    _, ids = stored(tmp_path / "elsewhere")
    assert ids == [record["id"]] and not (tmp_path / "run" / "wandb").exists()


def test_the_environment_decides_where_the_config_does_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    record = start(tmp_path, wandb_mode=None)
    assert stored(tmp_path)[1] == [record["id"]]
    assert "warning" not in capsys.readouterr().err  # nobody has asked for a server
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start(tmp_path / "other", wandb_mode=None)
    assert not list((tmp_path / "other").glob("wandb/*run-*"))
    start(tmp_path / "third", wandb_mode="offline")
    assert len(stored(tmp_path / "third")[1]) == 1


@pytest.mark.parametrize("environment", ["offline", "disabled"])
def test_the_config_overrules_the_environment(environment, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", environment)
    start(tmp_path / "offline", wandb_mode="offline")  # wandb has then read its environment
    assert "warning" not in capsys.readouterr().err
    start(tmp_path / "online", wandb_mode="online")
    # It went as far as to look for a key: "not logged in" would be the environment's doing.
    error = capsys.readouterr().err
    assert error.count("warning: wandb is offline") == 1 and "No API key" in error


def test_an_unknown_mode_in_the_environment_is_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    config = LoggingConfig(dir=str(tmp_path), tensorboard=False, wandb_project="project")
    with TrainLogger(config, RunInfo(1000), io.StringIO()) as logger:
        logger.log_step({**VALUES, "iteration": 1})
    error = capsys.readouterr().err
    assert error.count("\n") == error.count("warning: going on without wandb") == 1
    assert "WANDB_MODE=ofline" in error and "offline" in error


def test_without_a_key_it_goes_offline(tmp_path, capsys):
    record = start(tmp_path, wandb_mode="online")
    error = capsys.readouterr().err
    assert error.count("warning: wandb is offline") == 1 and "No API key" in error
    assert stored(tmp_path)[1] == [record["id"]]


@pytest.mark.slow  # wandb takes ten seconds to give a server up
def test_without_a_server_it_goes_offline_and_the_key_stays_secret(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("fp8lm.metrics.wandb_run.INIT_TIMEOUT", 1)
    record = start(tmp_path, wandb_mode="online", facts={"git": {"commit": "0123abc"}})
    captured = capsys.readouterr()
    assert captured.err.count("warning: wandb is offline") == 1
    kept, ids = stored(tmp_path)
    assert record["id"] in ids and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert KEY not in captured.out + captured.err and KEY.encode() not in kept


def test_a_wandb_that_cannot_be_imported_is_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = LoggingConfig(dir=str(tmp_path), tensorboard=False, wandb_project="project")
    with TrainLogger(config, RunInfo(1000), io.StringIO()) as logger:
        logger.log_step({**VALUES, "iteration": 1})
    error = capsys.readouterr().err
    assert error.count("\n") == error.count("warning: going on without wandb") == 1


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    config = LoggingConfig(wandb_project="x", wandb_save_dir=str(tmp_path / "file" / "below"))
    with TrainLogger(config, RunInfo(1000), io.StringIO()) as logger:
        logger.log_step({**VALUES, "iteration": 1})
    error = capsys.readouterr().err
    assert error.count("\n") == error.count("warning: going on without wandb") == 1


def test_a_damaged_record_is_another_run(tmp_path):
    first = start(tmp_path, error=RuntimeError())
    (tmp_path / "wandb_run.json").write_text('{"id": "ab')
    assert start(tmp_path)["id"] not in ("ab", first["id"])
