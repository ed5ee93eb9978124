"""The model that a run trains, ready to compute: a view of its weights, not a copy.

Each chunk of the run has a second set of modules whose parameters alias its own. Layers, shards and
names are the same; what differs is what generation changes: a scale for each token, wires in the
dtype of activations, no sequence parallelism. The run's quantizers, histories, hooks and counters
are not used, so that it trains on as if nothing had been computed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from fp8lm.comm import WireCounter
from fp8lm.config import Config
from fp8lm.generate.model import InferenceModel
from fp8lm.layers.param import named_params
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.tp_context import TPContext
from fp8lm.model import GPTModel
from fp8lm.parallel.parallelize import build_tp_context
from fp8lm.telemetry.observing import linears_of
from fp8lm.training.build import Run
from fp8lm.training.restore import wires_in_bf16


@dataclass(frozen=True)
class LiveModel:
    """Opens the model of a run as often as it is wanted; nothing is held in between."""

    run: Run
    tp: TPContext

    @classmethod
    def of(cls, run: Run) -> LiveModel:
        """Of `run`; a collective of all ranks, which may make process groups."""
        config = _without_sequence_parallel(run.config)
        return cls(run, build_tp_context(config, run.groups, run.optimizer.kernels, WireCounter()))

    def open(self, in_bf16: Collection[str] = ()) -> InferenceModel:
        """The model as its weights are now, until the next step; layers `in_bf16` compute so.

        With overlapped parameter gathers it waits for the weights.
        """
        run = self.run
        run.data_parallel.finish_param_sync()
        return InferenceModel(
            [self._view(chunk, in_bf16) for chunk in run.chunks],
            run.tokenizer,
            run.config,
            run.groups,
            run.optimizer.kernels,
            run.device,
            [],
        )

    def _view(self, chunk: GPTModel, in_bf16: Collection[str]) -> GPTModel:
        run = self.run
        # No memory is taken on the meta device; what is not a parameter comes from `chunk`, too.
        meta = torch.device("meta")
        recipe = Recipe.from_config(run.config.precision, run.optimizer.kernels, meta, self.tp)
        view = GPTModel(run.config.model, run.vocab_size, recipe.for_inference(), part=chunk.part)
        own = named_params(view)
        for name, weight in named_params(chunk).items():
            own[name].alias(weight)
        view.rope = chunk.rope
        for name, linear in linears_of([view]).items():
            if name in in_bf16:
                linear.fall_back()
        return view.eval()


def _without_sequence_parallel(config: Config) -> Config:
    parallel = config.parallel.model_copy(update={"sequence_parallel": False})
    wire = config.precision.wire.model_copy(update=wires_in_bf16())
    precision = config.precision.model_copy(update={"wire": wire})
    return config.model_copy(update={"parallel": parallel, "precision": precision})
