"""The numbers of a report, under the keys of metrics.jsonl."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from fp8lm.data.packed_examples import PackedExamples
from fp8lm.training.build import Run
from fp8lm.training.flops import TERA, peak_of, throughput, training_flops
from fp8lm.training.memory import (
    bytes_per_parameter,
    linear_weights,
    memory_bytes,
    num_elements,
    state_bytes,
)
from fp8lm.training.progress import Interval, Progress


class StepMetrics:
    """Reported metrics of the steps of `run`; every method is a collective of all ranks."""

    def __init__(self, run: Run) -> None:
        self._run = run
        model = run.config.model
        self._flops_per_sample = training_flops(model, run.vocab_size, [model.seq_length])
        self.peak = peak_of(run.config.precision.gemm, run.device)
        self.num_parameters = _count_parameters(run)

    def values(
        self,
        progress: Progress,
        interval: Interval,
        window: dict[str, float],
        grad_norm: float,
        lr: float,
        sent: dict[str, int],
    ) -> dict[str, float]:
        """Metrics of the iterations since the last report; `window` is from `MetricAccumulator`.

        `sent`: bytes that this rank sent in the last iteration, by wire.
        """
        world_size = self._run.groups.world.size()
        tflops = throughput(self._flops_per_sample * interval.samples, interval.seconds, world_size)
        tokens = interval.samples * self._run.config.model.seq_length
        values: dict[str, float] = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "lm loss": _mean_loss(window),
            **{name: _mean(window, name) for name in self._run.training_objective.metrics},
            "learning-rate": lr,
            "batch-size": progress.batch_size,
            "grad-norm": grad_norm,
            "params-norm": self._run.optimizer.params_norm().item(),
            "skipped iterations": int(window["skipped"]),
            "nan iterations": int(window["nan"]),
            "rollbacks": progress.rollbacks,
            "iteration-time": interval.seconds / interval.iterations,
            "tokens-per-second": tokens / interval.seconds,
            "throughput": tflops,
            **{f"comm_bytes/{wire}": count for wire, count in sent.items()},
        }
        if isinstance(dataset := self._run.datasets[0], PackedExamples):
            values["epoch"] = progress.consumed_samples / dataset.samples_per_epoch
        if self._run.config.precision.grad_reduce != "fp32_accumulate":
            values |= _range_of_mu(self._run)
        if self.peak is not None:
            values["mfu"] = self.peak.utilization(tflops * TERA)
        return values | self._held() | memory_bytes(self._run.device)

    def _held(self) -> dict[str, float]:
        """Bytes of state, which change with layers that the guard moves to BF16."""
        run, states = self._run, self._run.optimizer.states
        held = state_bytes(run.weights, states, run.data_parallel.padding)
        if run.reference is not None:
            held["reference"] = run.reference.nbytes
        return {f"state_bytes/{kind}": size for kind, size in held.items()} | {
            "parameters": self.num_parameters,
            "state_bytes_per_parameter": sum(held.values()) / num_elements(run.weights),
            "state_bytes_per_linear_parameter": bytes_per_parameter(
                linear_weights(run.weights), states
            ),
        }


def _mean_loss(window: dict[str, float]) -> float:
    """Mean over the steps that have a loss; NaN if all were skipped, 0 if no token counts."""
    return _mean(window, "loss")


def _mean(window: dict[str, float], name: str) -> float:
    if window["steps"]:
        return window[name] / window["steps"]
    return float("nan") if window["skipped"] else 0.0


def _count_parameters(run: Run) -> int:
    """Number of parameters of the whole model; a collective of the pipeline's stages."""
    elsewhere = run.shared_params
    own = sum(math.prod(w.spec.shape) for n, w in run.weights.items() if n not in elsewhere)
    total = torch.tensor(own, device=run.device)
    if run.pipeline.num_stages > 1:
        dist.all_reduce(total, group=run.groups.pipeline_parallel)
    return int(total)


def _range_of_mu(run: Run) -> dict[str, float]:
    """Smallest and largest mu of the whole model, if it has any; a collective of the stages."""
    # A stage whose layers are all in BF16 has none, and takes part all the same.
    mus = run.data_parallel.named_tensors().values()
    none = torch.full((2,), -math.inf, device=run.device)
    ends = torch.stack([none, *(torch.stack((-mu, mu)) for mu in mus)]).amax(dim=0)
    if run.pipeline.num_stages > 1:
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=run.groups.pipeline_parallel)
    low, high = ends.tolist()
    return {} if high == -math.inf else {"fp8/mu/min": -low, "fp8/mu/max": high}
