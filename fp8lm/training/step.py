"""One training step and one evaluation: what reads like the paper."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8lm.layers.param import Param, QuantizedParam
from fp8lm.layers.tp_context import TPContext
from fp8lm.layers.weight_operands import cached_weight_operands
from fp8lm.optim import AdamW
from fp8lm.parallel.data_parallel import NoDataParallel
from fp8lm.parallel.pipeline import Pipeline
from fp8lm.scaled_tensor import ScaledTensor
from fp8lm.training.loss_weights import Batch, counted_share, weigh_alike

# What every rank tells all others in a step: its loss, and why to stop after it (0: go on).
NUM_TOLD = 2


@dataclass(frozen=True)
class StepResult:
    """0-d tensors on the device: `loss`, `grad_norm`, `share`, `skipped`, `stop`.

    `loss` is the mean over the step's tokens that count, whose share of all is `share`; 0 if none
    does. `stop` is the largest that any rank was given.
    """

    loss: Tensor
    grad_norm: Tensor
    share: Tensor
    skipped: Tensor
    stop: Tensor


def train_step(
    model: nn.Module,
    optimizer: AdamW,
    microbatches: list[Batch],
    lr: float,
    data_parallel: NoDataParallel | None = None,
    pipeline: Pipeline | None = None,
    stop: float = 0.0,
    per_token: bool = True,
) -> StepResult:
    """Accumulate the gradients of `microbatches`, then update; no host synchronisation.

    A non-finite loss, gradient or amax leaves all state as it was, bit for bit, on all ranks. All
    tokens that count do so alike (see `loss_weights`), or with `per_token` false all micro-batches.
    With a `pipeline`, `model` is this stage's part. `stop` goes to all ranks with the step's other
    scalars. Where no token counts the gradient is zero: moments and weights decay.
    """
    model.train()
    weights, tp = optimizer.weights, optimizer.tp
    data_parallel = data_parallel or NoDataParallel(weights)
    zero_gradients(weights)
    share = counted_share(microbatches) if per_token else None
    if not per_token:
        microbatches = weigh_alike(microbatches)
    if any(isinstance(w, QuantizedParam) and w.needs_cast for w in weights.values()):
        data_parallel.finish_param_sync()
    with cached_weight_operands(weights.values(), tp):
        if pipeline is None:
            loss = accumulate_gradients(model, microbatches, data_parallel.enable_grad_sync)
        else:
            loss = pipeline.train(microbatches, data_parallel.enable_grad_sync)
    gradients = data_parallel.reduce()
    complete_gradients(weights, gradients, tp)
    told = torch.stack((loss, torch.full_like(loss, stop)))
    norm = optimizer.step(lr, gradients, told, share)
    data_parallel.finish_step(norm.skip)
    losses, stops = norm.values.unbind(dim=1)
    # Only the last stage of a pipeline has a loss, the others zero.
    stages = 1 if pipeline is None else pipeline.num_stages
    loss = losses.mean() * stages * norm.per_token
    return StepResult(loss, norm.norm, norm.share, norm.skip, stops.max())


def accumulate_gradients(
    model: nn.Module, microbatches: list[Batch], before_last: Callable[[], None]
) -> Tensor:
    """Forward and backward of every micro-batch; the mean of `batch_loss` (0-d fp32, detached)."""
    losses = []
    for number, batch in enumerate(microbatches, start=1):
        if number == len(microbatches):
            before_last()
        loss = batch_loss(model, batch) / len(microbatches)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of one micro-batch over all its tokens: dict of `tokens`, `labels`, `loss_mask` [B,S].

    `samples` [B], the samples' numbers in the run, are needed by dropout only.
    """
    inputs = (batch["tokens"], batch["labels"], batch["loss_mask"])
    return model.loss(*inputs, batch.get("samples"))


def seed_generators(seed: int, consumed_samples: int, *ranks: int) -> None:
    """Seed what attention dropout draws from: another stream for every step and every rank.

    A function of where the run is, so that a resumed run has no random state to restore.
    Recomputation puts the generator back by itself.
    """
    digest = hashlib.sha256(f"{seed}/{consumed_samples}/{ranks}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def evaluate(model: nn.Module, microbatches: list[Batch]) -> Tensor:
    """Mean of `batch_loss` over `microbatches` without dropout (0-d fp32)."""
    model.eval()
    return torch.stack([batch_loss(model, batch) for batch in microbatches]).mean()


def zero_gradients(weights: dict[str, Param]) -> None:
    """Start new sums."""
    for weight in weights.values():
        weight.main_grad.zero()


def complete_gradients(
    weights: dict[str, Param], gradients: dict[str, ScaledTensor], tp: TPContext
) -> None:
    """Sum over the ranks of `partition` what each computed from its part of the sequence."""
    tp.sum_in_place(
        gradient.payload
        for name, gradient in gradients.items()
        if weights[name].spec.sequence_parallel
    )
