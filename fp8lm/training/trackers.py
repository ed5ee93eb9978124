"""Experiment trackers: TensorBoard and Weights & Biases, under the keys of metrics.jsonl."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8lm.config import LoggingConfig

LOGIN_TIMEOUT = 30  # seconds to answer wandb's question for a key on a terminal
INIT_TIMEOUT = 60  # seconds for wandb's server to answer
FINISH_TIMEOUT = 300  # seconds to upload what is left at the end
RUN_ID = "wandb_run_id.txt"


class TensorBoard:
    """Scalars in `folder`; events after `first_iteration`, from before a resume, are hidden."""

    def __init__(self, folder: Path, first_iteration: int) -> None:
        # Imported here: it takes a second, and many runs do without.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_iteration + 1)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Write scalars of one iteration to disk."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


class WandB:
    """A run at Weights & Biases, which never stops the training: its failures are one warning.

    Without a key or a server the run is kept on disk, as with `wandb_mode: offline`. With a
    logging.dir, a resumed run goes on under its former id.
    """

    def __init__(
        self, config: LoggingConfig, run_config: Mapping[str, Any], first_iteration: int
    ) -> None:
        import wandb

        self._run = None
        self._options = dict(
            project=config.wandb_project,
            name=config.wandb_exp_name,
            config=dict(run_config),
            dir=config.dir,
            resume="allow",
            id=_former_id(config.dir) if first_iteration else None,
            settings=_settings(wandb),
        )
        self._start(wandb, config.wandb_mode)
        if self._run is not None and config.dir is not None:
            Path(config.dir, RUN_ID).write_text(f"{self._run.id}\n")

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Hand the values of one iteration to wandb's own process."""
        self._guarded("log to", lambda: self._run.log(dict(values), step=iteration))

    def close(self) -> None:
        """Finish the run."""
        self._guarded("finish", lambda: self._run.finish())

    def _start(self, wandb, mode: str) -> None:  # noqa: ANN001
        if mode == "online":
            try:
                if not wandb.login(timeout=LOGIN_TIMEOUT):
                    raise ConnectionError("not logged in")
                self._run = wandb.init(**self._options, mode=mode)
            except Exception as error:
                _warn(f"wandb is offline, `wandb sync` later: {error}")
                mode = "offline"
        if self._run is None:
            try:
                self._run = wandb.init(**self._options, mode=mode)
            except Exception as error:
                _warn(f"going on without wandb: {error}")

    def _guarded(self, action: str, call) -> None:  # noqa: ANN001
        if self._run is None:
            return
        try:
            call()
        except Exception as error:
            self._run = None
            _warn(f"going on without wandb, which could not {action} its run: {error}")


def _settings(wandb):  # noqa: ANN001, ANN202
    # Without an end to waiting, a lost server would hold a finished job; old versions have none.
    known = "finish_timeout" in wandb.Settings.model_fields
    limit = {"finish_timeout": FINISH_TIMEOUT} if known else {}
    return wandb.Settings(console="off", init_timeout=INIT_TIMEOUT, **limit)


def _former_id(folder: str | None) -> str | None:
    path = Path(folder, RUN_ID) if folder is not None else None
    return path.read_text().strip() if path is not None and path.exists() else None


def _warn(text: str) -> None:
    print(f" warning: {' '.join(text.split())}", file=sys.stderr, flush=True)
