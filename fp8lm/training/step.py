"""One training step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fp8lm.batch import Batch
from fp8lm.layers.amax_history import AmaxHistories
from fp8lm.layers.param import Param, QuantizedParam, named_params
from fp8lm.layers.tp_context import TPContext
from fp8lm.layers.weight_operands import weight_operands
from fp8lm.model import GPTModel
from fp8lm.model.objectives import Objective
from fp8lm.optim import AdamW
from fp8lm.parallel.data_parallel import NoDataParallel
from fp8lm.parallel.pipeline import Executor, NoPipeline
from fp8lm.scaled_tensor import ScaledTensor


@dataclass(frozen=True)
class StepResult:
    """0-d tensors on the device: `loss`, `grad_norm`, `share`, `skipped`, `stop`.

    `loss` is the mean over the step's counted tokens (0 if there is none), `share` their share of
    all. `stop` is the largest reason of any rank. `metrics` are means like the loss, by name.
    """

    loss: Tensor
    grad_norm: Tensor
    share: Tensor
    skipped: Tensor
    stop: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def train_step(
    model: GPTModel | nn.ModuleList,
    optimizer: AdamW,
    objective: Objective,
    microbatches: list[Batch],
    lr: float,
    data_parallel: NoDataParallel | None = None,
    pipeline: Executor | None = None,
    histories: AmaxHistories | None = None,
    *,
    stop: float = 0.0,
) -> StepResult:
    """Accumulate the gradients of `microbatches`, then update; no host synchronisation.

    A non-finite loss, gradient or amax leaves all state as it was, bit for bit, on all ranks.
    `objective` computes the loss and says which tokens count. `pipeline` runs `model`, this stage's
    part (default: the whole on one stage). `histories` are those of `model`, if its scaling is
    delayed. `stop` goes to all ranks with the step's other scalars.
    Where no token counts the gradient is zero: moments and weights decay.
    """
    if not model.training:
        model.train()
    weights, tp = optimizer.weights, optimizer.sharding.tp
    data_parallel = data_parallel or NoDataParallel(weights)
    if pipeline is None:
        if isinstance(model, nn.ModuleList):
            raise TypeError("several chunks need the pipeline that runs them")
        pipeline = NoPipeline(model.forward_step)
    zero_gradients(weights)
    share = objective.counted_share(microbatches)
    if any(isinstance(w, QuantizedParam) and w.needs_cast for w in weights.values()):
        data_parallel.finish_param_sync()
    num_tokens = sum(batch.tokens.numel() for batch in microbatches)
    recording = nullcontext() if histories is None else histories.recording(num_tokens)
    with recording, weight_operands(named_params(model).values(), tp) as cache_operands:
        loss, *metrics = pipeline.train(
            microbatches, objective, data_parallel.enable_grad_sync, cache_operands
        )
    gradients = data_parallel.reduce()
    complete_gradients(weights, gradients, tp)
    stops = torch.full_like(loss, stop)
    norm = optimizer.step(lr, gradients, share=share, loss=loss, stop=stops, metrics=metrics)
    data_parallel.start_param_sync(norm.skip)
    if histories is not None:
        histories.update(norm.skip)
    # Only the last stage of a pipeline has a loss, the others zero.
    loss = norm.losses.mean() * pipeline.num_stages * norm.per_token
    means = {
        name: of_ranks.mean() * pipeline.num_stages * norm.per_token
        for name, of_ranks in zip(objective.metrics, norm.metrics.unbind(dim=1), strict=True)
    }
    return StepResult(loss, norm.norm, norm.share, norm.skip, norm.stops.max(), means)


def seed_generators(seed: int, consumed_samples: int, *ranks: int) -> None:
    """Seed the generators of attention dropout: another stream for every step and rank.

    The seed is a function of the run's position, so a resumed run has no random state to restore.
    Recomputation restores the generator by itself.
    """
    digest = hashlib.sha256(f"{seed}/{consumed_samples}/{ranks}".encode()).digest()
    drawn = int.from_bytes(digest[:8], "little") >> 1
    # torch.manual_seed formats a traceback for every kind of accelerator that is not in use.
    torch.default_generator.manual_seed(drawn)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(drawn)


def zero_gradients(weights: dict[str, Param]) -> None:
    """Start new gradient sums."""
    for weight in weights.values():
        weight.main_grad.zero()


def complete_gradients(
    weights: dict[str, Param], gradients: dict[str, ScaledTensor], tp: TPContext
) -> None:
    """Sum gradients that each rank of `tp` computed from its tokens or heads alone."""
    tp.sum_in_place(
        gradient.payload
        for name, gradient in gradients.items()
        if weights[name].spec.sequence_parallel
    )
