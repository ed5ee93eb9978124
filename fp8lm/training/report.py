"""What a run reports of itself, and what its folder says of how it was started."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp8lm.metrics.logger import RunInfo, TrainLogger
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import make_folder
from fp8lm.training.banner import banner
from fp8lm.training.build import Run
from fp8lm.training.flops import TERA, peak_of, throughput, training_flops
from fp8lm.training.memory import (
    bytes_per_parameter,
    describe_state,
    linear_weights,
    memory_bytes,
    state_bytes,
)
from fp8lm.training.progress import Interval, Progress
from fp8lm.training.run_history import record_start, start_facts
from fp8lm.training.run_length import end_of_run


class Reporter:
    """Turns steps, evaluations and checkpoints of `run` into reports; a context manager.

    `may_write` says whether `logging.dir` is still this run's.
    """

    def __init__(
        self, run: Run, progress: Progress, may_write: Callable[[], bool] = lambda: True
    ) -> None:
        config, first_iteration = run.config, progress.iteration
        position = first_iteration, progress.consumed_samples
        self._run = run
        facts = start_facts() if run.groups.is_main else {}
        self._write_start(facts, first_iteration)
        info = RunInfo(
            total_iterations=end_of_run(config.train, run.batch_size, *position)[0],
            first_iteration=first_iteration,
            is_main=run.groups.is_main,
            config=config.model_dump(mode="json"),
            facts=facts,
            may_write=may_write,
        )
        self._logger = TrainLogger(config.logging, info)
        self._flops_per_sample = training_flops(
            config.model, run.vocab_size, [config.model.seq_length]
        )
        self._peak = peak_of(config.precision.gemm, run.device)
        linear = linear_weights(run.weights)
        num_parameters = _count_parameters(run)
        for line in banner(run, num_parameters):
            self._logger.log_text(line)
        self._logger.log_text(describe_state(run.optimizer, linear))
        if self._peak is not None:
            self._logger.log_text(f" MFU is the share of {self._peak}")
        padding = run.data_parallel.padding
        held = state_bytes(run.optimizer, padding=padding)
        per_parameter = bytes_per_parameter(run.optimizer, list(run.weights), padding)
        self._constants = {f"state_bytes/{kind}": size for kind, size in held.items()} | {
            "parameters": num_parameters,
            "state_bytes_per_parameter": per_parameter,
            "state_bytes_per_linear_parameter": bytes_per_parameter(run.optimizer, linear),
        }

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._logger.__exit__(*error)

    def advance(self) -> None:
        """One iteration is done."""
        self._logger.advance()

    def log_training(
        self,
        progress: Progress,
        interval: Interval,
        window: dict[str, float],
        grad_norm: float,
        lr: float,
        sent: dict[str, int],
    ) -> None:
        """Report the iterations since the last report; `window` is from `MetricAccumulator`.

        `sent`: bytes that this rank sent in the last iteration, by wire.
        """
        world_size = self._run.groups.world.size()
        tflops = throughput(self._flops_per_sample * interval.samples, interval.seconds, world_size)
        values = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "lm loss": _mean_loss(window),
            "learning-rate": lr,
            "batch-size": progress.batch_size,
            "grad-norm": grad_norm,
            "params-norm": self._run.optimizer.params_norm().item(),
            "skipped iterations": int(window["skipped"]),
            "nan iterations": int(window["nan"]),
            "rollbacks": progress.rollbacks,
            "iteration-time": interval.seconds / interval.iterations,
            "tokens-per-second": interval.samples
            * self._run.config.model.seq_length
            / interval.seconds,
            "throughput": tflops,
            **{f"comm_bytes/{wire}": count for wire, count in sent.items()},
        }
        if self._run.config.precision.grad_reduce != "fp32_accumulate":
            values |= _range_of_mu(self._run)
        if self._peak is not None:
            values["mfu"] = self._peak.utilization(tflops * TERA)
        self._logger.log_step(values | self._constants | memory_bytes(self._run.device))

    def rewind(self, progress: Progress) -> None:
        """Forget the reports of iterations after that of `progress`."""
        self._logger.rewind(progress.iteration)

    def log_text(self, line: str) -> None:
        """Print a line."""
        self._logger.log_text(line)

    def log_evaluation(self, split: str, iteration: int, loss: float) -> None:
        """Report an evaluation."""
        self._logger.log_validation(iteration, loss, split)

    def log_saved(self, iteration: int, folder: str) -> None:
        """Report a saved checkpoint."""
        self._logger.log_saved(iteration, folder)

    def _write_start(self, facts: dict[str, Any], first_iteration: int) -> None:
        folder, groups = self._run.config.logging.dir, self._run.groups
        if folder is None or not groups.is_main:
            return
        try:
            make_folder(Path(folder))
            self._run.config.save_yaml(Path(folder) / "config.yaml")
            record_start(Path(folder), facts, first_iteration, groups.world.size())
        except OSError as error:
            raise InputError(
                f"logging.dir={folder} cannot be written to: {error.strerror}"
            ) from error


def _mean_loss(window: dict[str, float]) -> float:
    """Of the steps that have a loss; NaN where all were skipped, 0 where no token counts."""
    if window["steps"]:
        return window["loss"] / window["steps"]
    return float("nan") if window["skipped"] else 0.0


def _count_parameters(run: Run) -> int:
    """Of the whole model; a collective of the pipeline's stages."""
    elsewhere = run.shared_params
    own = sum(math.prod(w.spec.shape) for n, w in run.weights.items() if n not in elsewhere)
    total = torch.tensor(own, device=run.device)
    if run.pipeline.num_stages > 1:
        dist.all_reduce(total, group=run.groups.pipeline_parallel)
    return int(total)


def _range_of_mu(run: Run) -> dict[str, float]:
    """Smallest and largest of the whole model, if it has any; a collective of the stages."""
    # A stage whose layers are all in BF16 has none, and takes part all the same.
    mus = run.data_parallel.named_tensors().values()
    none = torch.full((2,), -math.inf, device=run.device)
    ends = torch.stack([none, *(torch.stack((-mu, mu)) for mu in mus)]).amax(dim=0)
    if run.pipeline.num_stages > 1:
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=run.groups.pipeline_parallel)
    low, high = ends.tolist()
    return {} if high == -math.inf else {"fp8/mu/min": -low, "fp8/mu/max": high}
