"""A Weights & Biases run, continued under its id when training restarts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fp8lm.config import LoggingConfig
from fp8lm.runtime.files import read_regular, write_whole
from fp8lm.runtime.streams import warn

LOGIN_TIMEOUT = 30  # seconds to answer wandb's question for a key on a terminal
INIT_TIMEOUT = 60  # seconds for wandb's server to answer
FINISH_TIMEOUT = 300  # seconds to upload what is left at the end
RECORD = "wandb_run.json"
LARGEST_RECORD = 2**20


@dataclass(frozen=True)
class RunRecord:
    """The record of the wandb run in `logging.dir`: its id, and whether a start continues it."""

    id: str
    project: str | None
    entity: str | None
    config: str  # digest of the training's config
    finished: bool

    def continues(self, start: RunRecord, resumed: bool) -> bool:
        """Whether `start` goes on with this run.

        One that resumes a checkpoint does. One from the beginning does if the former start broke
        off, before its first checkpoint, in the same config; otherwise it is another run.
        """
        if (self.project, self.entity) != (start.project, start.entity):
            return False
        return resumed or (not self.finished and self.config == start.config)


class WandB:
    """Without a key or a server the run is kept on disk, as with `wandb_mode: offline`."""

    def __init__(
        self,
        config: LoggingConfig,
        run_config: Mapping[str, Any],
        first_iteration: int,
        facts: Mapping[str, Any],
    ) -> None:
        """`run_config` and `facts` (versions, revision) become wandb's config."""
        import wandb

        folder = config.dir or config.wandb_save_dir
        self._path = Path(folder, RECORD) if folder is not None else None
        start = RunRecord(
            "", config.wandb_project, config.wandb_entity, _digest(run_config), finished=False
        )
        former = _read(self._path)
        continued = former is not None and former.continues(start, first_iteration > 0)
        run_id = former.id if former is not None and continued else None
        self._run = _init(wandb, config, run_id, {**run_config, **facts})
        # wandb drops what is logged at a step it has passed, and iterations that are done again
        # would be: they are an axis of their own, and its steps only count calls.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        self._record = replace(start, id=self._run.id)
        self._remember()

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Hand the values of one iteration to wandb's own process."""
        self._run.log({"iteration": iteration, **values})

    def rewind(self, iteration: int) -> None:
        """Nothing: wandb forgets nothing, and shows both attempts at an iteration."""

    def close(self, failed: bool) -> None:
        """Finish the run, as a failed one if the training has failed."""
        self._run.finish(exit_code=int(failed))
        self._record = replace(self._record, finished=not failed)
        self._remember()

    def _remember(self) -> None:
        if self._path is None:
            return
        try:
            write_whole(self._path, json.dumps(asdict(self._record), indent=2) + "\n")
        except OSError as error:
            warn(f"{self._path} is not up to date, the next start may be another run: {error}")


def _init(wandb: Any, config: LoggingConfig, run_id: str | None, run_config: dict[str, Any]) -> Any:
    """Start wandb's run: online if that is asked for and possible, else offline."""
    folder = config.wandb_save_dir or config.dir
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)  # wandb would go to /tmp without
    options = dict(
        id=run_id,
        config=run_config,
        project=config.wandb_project,
        entity=config.wandb_entity,
        name=config.wandb_exp_name,
        group=config.wandb_group,
        tags=config.wandb_tags,
        dir=folder,
        resume="allow",
        allow_val_change=True,  # of the config, when a run goes on with other keys
        settings=_settings(wandb),
    )
    mode = _mode(config.wandb_mode, os.environ)
    if mode == "online":
        try:
            # login() obeys WANDB_MODE by itself, although the config has overruled it.
            wandb.setup(settings=wandb.Settings(mode="online"))
            if not wandb.login(timeout=LOGIN_TIMEOUT):
                raise ConnectionError("not logged in")
            return wandb.init(**options, mode="online")
        except Exception as error:
            warn(f"wandb is offline, `wandb sync` later: {error}")
    return wandb.init(**options, mode="disabled" if mode == "disabled" else "offline")


def _mode(asked: str | None, environment: Mapping[str, str]) -> str:
    """online, offline or disabled: the config's, else the environment's, in wandb's words.

    ValueError for a word that wandb does not know, or that asks for what is not done here.
    """
    mode = asked or environment.get("WANDB_MODE") or "online"
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode not in ("online", "offline", "disabled"):
        raise ValueError(f"WANDB_MODE={mode}: expected online, offline or disabled")
    return mode


def _settings(wandb: Any) -> Any:
    # Without an end to waiting, a lost server would hold a finished job; old versions have none.
    known = "finish_timeout" in wandb.Settings.model_fields
    limit = {"finish_timeout": FINISH_TIMEOUT} if known else {}
    return wandb.Settings(console="off", init_timeout=INIT_TIMEOUT, **limit)


def _digest(run_config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run_config, sort_keys=True).encode()).hexdigest()


def _read(path: Path | None) -> RunRecord | None:
    if path is None:
        return None
    try:
        return RunRecord(**json.loads(read_regular(path, LARGEST_RECORD)))
    except (OSError, ValueError, TypeError):
        return None  # none yet, or cut off by a full disk: a new run
