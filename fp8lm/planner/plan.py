"""The plan of one run, as `python -m fp8lm.launch --dry-run` prints it."""

from __future__ import annotations

from dataclasses import dataclass

from fp8lm.config import Config, PrecisionConfig
from fp8lm.planner.batches import Batches, plan_batches
from fp8lm.planner.describe import rank_table, stage_table, summary
from fp8lm.planner.layout import Layout, plan_layout

BASELINE = "bf16"  # what a run's bytes are compared with


@dataclass(frozen=True)
class Plan:
    """Layout and steps of a run, and its layout in BF16 for comparison (None: it is BF16)."""

    layout: Layout
    batches: Batches
    baseline: Layout | None
    num_ids: int

    def summary(self) -> list[str]:
        """The arithmetic, which the files in configs/ open with too."""
        compared = [] if self.baseline is None else [self.baseline]
        return summary(self.layout, self.batches, compared)

    def table(self, all_ranks: bool = False) -> list[str]:
        """The layout: a line per stage, or per rank."""
        return rank_table(self.layout) if all_ranks else stage_table(self.layout)

    def predictions(self, gpu: str) -> list[str]:
        """Memory, wires and time on GPUs of the kind `gpu`; InputError if it is not known."""
        from fp8lm.planner.estimate import Estimate, estimate  # what a launch alone does not need
        from fp8lm.planner.report import heading, table
        from fp8lm.planner.tracing.roofline import Hardware

        hardware = Hardware.find(gpu)
        layouts = [self.layout, *([] if self.baseline is None else [self.baseline])]
        estimates: dict[str, Estimate] = {
            layout.config.precision.preset: estimate(layout, self.num_ids, hardware)
            for layout in layouts
        }
        own = next(iter(estimates.values()))
        return [heading(own), *table(estimates, BASELINE).splitlines()]


def plan_run(config: Config, num_ids: int, world_size: int, node_size: int) -> Plan:
    """Plan a run; InputError if processes or batches do not divide."""
    layout = plan_layout(config, num_ids, world_size, node_size)
    batches = plan_batches(config, layout.dims.dp)
    baseline = None
    if config.precision.preset != BASELINE:
        plain = config.model_copy(update={"precision": PrecisionConfig(preset=BASELINE)})
        baseline = plan_layout(plain, num_ids, world_size, node_size)
    return Plan(layout, batches, baseline, num_ids)
