"""The hooks of every training, and the trainer that has them: `build_trainer`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from fp8lm.comm.env import DistEnv
from fp8lm.runtime.run_lock import RunLocks
from fp8lm.training.build import Run
from fp8lm.training.hooks.guards import (
    LossSpikeHook,
    SkippedStepsHook,
    StopHook,
    WatchdogHook,
)
from fp8lm.training.hooks.periodic import EvaluationHook, SaveHook
from fp8lm.training.hooks.reporting import ReportHook
from fp8lm.training.hooks.telemetry import TelemetryHook
from fp8lm.training.trainer import Trainer, TrainerHook


def build_trainer(
    run: Run, locks: RunLocks | None = None, hooks: Sequence[TrainerHook] = ()
) -> Trainer:
    """A trainer of `run`, which has loaded nothing yet; `hooks` act after those of every run.

    `locks` are of the run's folders (see `run_folders.locked_folders`).
    """
    config, locks = run.config, RunLocks() if locks is None else locks
    stats = config.logging.fp8_stats_interval
    train, launch = config.train, DistEnv.from_environment(os.environ)
    return Trainer(
        run,
        [
            StopHook(train, config.checkpoint, launch, locks),
            ReportHook(config.logging.log_interval, run.groups.is_main),
            *([] if stats is None else [TelemetryHook(stats)]),
            WatchdogHook(run.groups, train.slow_step_factor),
            SkippedStepsHook(train.max_consecutive_skips),
            LossSpikeHook(train.max_rollbacks),
            EvaluationHook(train.eval_interval),
            SaveHook(config.checkpoint.save_interval),
            *hooks,
        ],
        locks,
    )
