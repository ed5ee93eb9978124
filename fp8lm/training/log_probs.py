"""Computes the log-probabilities of a reference model once, for `tuning.reference_logprobs`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fp8lm.checkpoint.collectives import from_all
from fp8lm.data.packed_examples import PackedExamples
from fp8lm.data.reference_losses import ReferenceLosses
from fp8lm.data.splits import SPLITS
from fp8lm.training.evaluation import run_batches
from fp8lm.training.trainer import Trainer


def compute_log_probs(trainer: Trainer, progress: Callable[[int], object]) -> ReferenceLosses:
    """The losses of all examples by the reference of `trainer`, which has loaded its weights.

    A collective of all ranks, each of which gets them; `progress` is told of samples.
    """
    digests, losses = {}, {}
    for name, dataset in zip(SPLITS, trainer.run.datasets, strict=True):
        if isinstance(dataset, PackedExamples):
            digests[name] = dataset.chosen.digest()
            losses[name] = _losses_of(trainer, dataset, progress)
    return ReferenceLosses(trainer.checkpoints.reference_identity, digests, losses)


def _losses_of(
    trainer: Trainer, dataset: PackedExamples, progress: Callable[[int], object]
) -> np.ndarray:
    run = trainer.run
    own: dict[int, np.ndarray] = {}
    num_samples = dataset.samples_per_epoch
    batch = run.config.train.global_batch_size
    every = dataset.once(batch)
    with run_batches(run, every, 0) as batches:
        count = batch // batches.stride
        for _ in range(len(every) // batch):
            microbatches = [each.to(run.device) for each in batches.next(count)]
            for found in run.with_reference(microbatches):
                if found.reference_losses is None or run.groups.tensor_parallel.rank():
                    continue
                assert found.sample_ids is not None
                rows = found.reference_losses.cpu().numpy()
                own |= dict(zip(found.sample_ids.tolist(), rows, strict=True))
            progress(batch)
    result = np.zeros(int(dataset.chosen.sizes.sum()), np.float32)
    for ranks in from_all(run.groups.world, own):
        for sample, row in ranks.items():
            for here, among_all in dataset.label_ranges(sample) if sample < num_samples else ():
                result[among_all] = row[here]
    return result
