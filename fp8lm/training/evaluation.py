"""The loss on held-out data, in the formats of training, without dropout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.batch import Batch
from fp8lm.comm import Wire, all_gather_scalars
from fp8lm.config import TrainConfig
from fp8lm.data.batches import BatchIterator, SizedDataset
from fp8lm.layers.weight_operands import cached_weight_operands
from fp8lm.optim.clipping import per_counted_token
from fp8lm.training.build import Run


@dataclass(frozen=True)
class Evaluation:
    """Mean `loss` in nats, and the objective's `metrics` by name."""

    loss: float
    metrics: Mapping[str, float]


def evaluate(run: Run, dataset: SizedDataset, first_sample: int = 0) -> Evaluation:
    """Means over `train.eval_iters` global batches; a collective of all ranks.

    Every counted token has the same weight, whatever its batch and rank.
    """
    config = run.config.train
    run.data_parallel.finish_param_sync()
    with (
        run_batches(run, dataset, first_sample) as batches,
        cached_weight_operands(run.weights.values(), run.optimizer.sharding.tp),
    ):
        count = config.eval_iters * config.global_batch_size // batches.stride
        loss, *metrics = _means_over_ranks(run, *_local_means(run, batches, count)).tolist()
    names = run.objective.for_evaluation().metrics
    return Evaluation(loss, dict(zip(names, metrics, strict=True)))


def first_validation_sample(train: TrainConfig, iteration: int, num_samples: int) -> int:
    """Where in the `num_samples` of the validation split the evaluation of `iteration` begins.

    With `train.eval_new_samples` an evaluation continues after the previous one, as in Megatron-LM.
    The first is that of iteration `train.eval_interval`; the one before training, which Megatron-LM
    does not have, reads the same samples. A function of the iteration: a resumed run reads the
    same.
    """
    if not train.eval_new_samples:
        return 0
    size = train.eval_iters * train.global_batch_size
    number = max(0, -(-iteration // train.eval_interval) - 1)
    return number % (num_samples // size) * size


def run_batches(
    run: Run, dataset: SizedDataset, consumed_samples: int, skipped_samples: int = 0
) -> BatchIterator:
    """This rank's micro-batches of `dataset`."""
    group = run.groups.data_parallel
    return BatchIterator(
        dataset,
        micro_batch_size=run.config.train.micro_batch_size,
        rank=group.rank(),
        world_size=group.size(),
        consumed_samples=consumed_samples,
        skipped_samples=skipped_samples,
        num_workers=run.config.data.num_workers,
        worker_timeout=run.config.data.worker_timeout,
        pin_memory=run.device.type == "cuda",
    )


def _local_means(run: Run, batches: BatchIterator, count: int) -> tuple[list[Tensor], Tensor]:
    """Means of `count` micro-batches (see `Executor`), and the share of tokens that count."""
    objective, shares = run.objective.for_evaluation(), []

    def microbatches() -> Iterator[Batch]:
        for _ in range(count):
            batch = batches.next(1)[0].to(run.device)
            shares.append(objective.counted_share([batch]))
            yield batch

    run.model.eval()
    means = run.pipeline.evaluate(run.with_reference(microbatches()), objective)
    return means, torch.stack(shares).double().mean().float()


def _means_over_ranks(run: Run, means: list[Tensor], share: Tensor) -> Tensor:
    wire = Wire("grads", "fp32", run.sent)
    ranks = all_gather_scalars(torch.stack((share, *means)), run.groups.world, wire)
    stages = run.groups.pipeline_parallel.size()
    per_token = per_counted_token(ranks[:, 0].double().mean()).float()
    return torch.stack([mean.mean() for mean in ranks[:, 1:].unbind(1)]) * stages * per_token
