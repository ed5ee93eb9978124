"""A model as layers of equal cost and what is around them, from traces of two small models.

All layers are alike, but for the first and the last where the config makes these BF16. So two
models are traced that differ by one layer: that layer is their difference, and the `ends`
(embedding, head, loss) are what is left without any.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fp8lm.config import Config
from fp8lm.planner.tracing.roofline import Hardware
from fp8lm.planner.tracing.run import TracedStep, trace_step


@dataclass(frozen=True)
class TracedModel:
    """A step of a layer and of the ends, on one rank of one replica without a pipeline."""

    layer: TracedStep
    ends: TracedStep

    def of_layers(self, number: int) -> TracedStep:
        """A whole model of `number` layers."""
        return self.layer.times(number) + self.ends

    def with_micro_batch(self, doubled: TracedModel, factor: float) -> TracedModel:
        """With a micro-batch `factor` times as large, on the line to one that is `doubled`."""
        return TracedModel(
            self.layer + (doubled.layer - self.layer).times(factor - 1),
            self.ends + (doubled.ends - self.ends).times(factor - 1),
        )

    def with_memory_of(self, other: TracedModel) -> TracedModel:
        """This one, with the memory of `other`."""
        return TracedModel(
            replace(self.layer, memory=other.layer.memory),
            replace(self.ends, memory=other.ends.memory),
        )


def trace_model(
    config: Config,
    num_ids: int,
    hardware: Hardware,
    kernels: str | None = None,
    *,
    observed: bool = False,
) -> TracedModel:
    """Trace `config`, whatever its pipeline and its replicas; `observed`: see `trace_step`."""
    ranks = config.parallel.tensor_model_parallel_size
    least = 3 if config.precision.first_last_layers_bf16 else 1
    small, larger = (
        trace_step(one_stage(config, layers), num_ids, hardware, ranks, kernels, observed=observed)
        for layers in (least, least + 1)
    )
    layer = larger - small
    return TracedModel(layer, small - layer.times(least))


def one_stage(config: Config, num_layers: int, **parallel: Any) -> Config:
    """`config` with so many layers and no pipeline; `parallel` are further keys of that section."""
    no_pipeline = {
        "pipeline_model_parallel_size": 1,
        "pipeline_schedule": "1f1b",
        "num_layers_per_virtual_pipeline_stage": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
    }
    return with_keys(config, model={"num_layers": num_layers}, parallel={**no_pipeline, **parallel})


def with_keys(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with other values of the keys of some sections, which are not checked again."""
    changed = {
        name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()
    }
    return config.model_copy(update=changed)
