"""The frozen reference model of preference training: what the run has started from.

It holds weights alone, without gradients or optimizer states: E4M3 and a scale where the run's
GEMMs are FP8 with one scale per weight, which is one byte per parameter; else the format of the
run's own weights. Where that is not E4M3, the reference is cast as the run casts it for its GEMMs,
so that both compute the same until the first step.

Its layout is the run's: the same ranks hold the same parts, replicated over data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from fp8lm.batch import Batch
from fp8lm.comm import WireCounter
from fp8lm.config import Config, PrecisionConfig
from fp8lm.kernels import Kernels
from fp8lm.layers.param import Param, freeze, named_params
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.tp_context import TPContext
from fp8lm.layers.weight_operands import cached_weight_operands
from fp8lm.model import GPTModel
from fp8lm.model.objectives import LanguageModeling
from fp8lm.parallel.parallelize import build_pipeline, stage_specs
from fp8lm.parallel.pipeline import Executor, NoPipeline, Pipeline
from fp8lm.training.builders import build_model


def reference_precision(precision: PrecisionConfig) -> PrecisionConfig:
    """The formats of a reference model: its own scales, from what it computes, in every step."""
    keys: dict[str, object] = {"scaling_method": "current", "cache_weight_operands": False}
    if precision.gemm == "fp8" and precision.scaling.weight == "tensor":
        keys["params_dtype"] = "fp8_e4m3"
    return precision.model_copy(update=keys)


def reference_recipe(
    config: Config, kernels: Kernels, device: torch.device, tp: TPContext
) -> Recipe:
    """The recipe of a reference model: frozen."""
    precision = reference_precision(config.precision)
    return replace(Recipe.from_config(precision, kernels, device, tp), trainable=False)


@dataclass(frozen=True)
class Reference:
    """This rank's part of the reference model, `weights` by Megatron name, and what runs it."""

    chunks: list[GPTModel]
    weights: dict[str, Param]
    pipeline: Executor
    objective: LanguageModeling

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds, scales included."""
        return sum(weight.model_param.nbytes for weight in self.weights.values())

    def copy_weights(self, source: Mapping[str, Param]) -> None:
        """Take over the weights of the run as they are now; a collective of tensor-parallel ranks.

        Bytes are copied where formats agree, else values are cast with the scale of the amax of the
        logical tensor.
        """
        for name, weight in self.weights.items():
            held, target = source[name].model_param, weight.model_param
            if held.format == target.format:
                target.copy_(held)
                continue
            kernels, tp = weight.kernels, self.objective.tp
            values = kernels.dequantize(held)
            amax = tp.max(kernels.amax(values)[None])[0]
            target.copy_(kernels.quantize(values, target.format, amax=amax))

    def attach(self, microbatches: Iterable[Batch]) -> Iterator[Batch]:
        """`microbatches` with `reference_losses`, which only the last pipeline stage has.

        Without a pipeline one at a time, as they are asked for.
        """
        if isinstance(self.pipeline, Pipeline):
            microbatches = list(microbatches)
            losses = self._token_losses(microbatches)  # none but on the last stage
            for batch, own in zip_longest(microbatches, losses):
                yield replace(batch, reference_losses=own)
            return
        for batch in microbatches:
            (own,) = self._token_losses([batch])
            yield replace(batch, reference_losses=own)

    def _token_losses(self, microbatches: list[Batch]) -> list[Tensor]:
        with cached_weight_operands(self.weights.values(), self.objective.tp):
            return list(self.pipeline.map(microbatches, self.objective.token_losses))


def build_reference(
    config: Config,
    vocab_size: int,
    kernels: Kernels,
    device: torch.device,
    objective: LanguageModeling,
    pipeline: Executor,
    counter: WireCounter,
    stage: int,
) -> Reference:
    """The reference of a run with this `objective` and `pipeline`, its weights zero."""
    recipe = reference_recipe(config, kernels, device, objective.tp)
    chunks = [
        build_model(config, vocab_size, recipe, part).eval() for part in stage_specs(config, stage)
    ]
    for chunk in chunks:
        freeze(chunk)  # vectors, too
    weights = {name: weight for chunk in chunks for name, weight in named_params(chunk).items()}
    own: Executor = NoPipeline(chunks[0].forward_step)
    if isinstance(pipeline, Pipeline):
        groups = pipeline.groups
        own = build_pipeline(config, chunks, groups, weights, kernels, counter, device)
    return Reference(chunks, weights, own, objective)
