"""Sums of launches by phase of the step and purpose, which add and scale like numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

# Phases: the first micro-batch overwrites gradients, every further one adds to them; the rest of
# the step happens once.
FIRST, FURTHER, ONCE = "first", "further", "once"
PHASES = (FIRST, FURTHER, ONCE)


@dataclass(frozen=True)
class Cost:
    """Of some launches: their number, bytes moved, flops, seconds; collectives and bytes sent."""

    launches: float = 0
    moved: float = 0
    flops: float = 0
    seconds: float = 0.0
    collectives: float = 0
    sent: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def times(self, factor: float) -> Cost:
        """`factor` such costs."""
        return Cost(*(factor * value for value in self.values()))

    @property
    def counts(self) -> tuple[float, ...]:
        """All but the seconds, exact where they are whole numbers."""
        return self.launches, self.moved, self.flops, self.collectives, self.sent

    def values(self) -> Iterator[float]:
        """The fields in their order."""
        return (getattr(self, field.name) for field in fields(self))


class StepCost:
    """Costs by (phase, purpose)."""

    def __init__(self, costs: dict[tuple[str, str], Cost] | None = None) -> None:
        self.costs = {} if costs is None else costs

    def add(self, phase: str, purpose: str, cost: Cost) -> None:
        """Count `cost`."""
        self.costs[phase, purpose] = self.costs.get((phase, purpose), Cost()) + cost

    def __add__(self, other: StepCost) -> StepCost:
        keys = {*self.costs, *other.costs}
        found = [(key, self.costs.get(key, Cost()) + other.costs.get(key, Cost())) for key in keys]
        # Where all counts cancel, the seconds do but for their rounding.
        return StepCost({key: cost for key, cost in found if any(cost.counts)})

    def times(self, factor: float) -> StepCost:
        """`factor` such steps."""
        return StepCost({key: cost.times(factor) for key, cost in self.costs.items()})

    def __sub__(self, other: StepCost) -> StepCost:
        return self + other.times(-1)

    def by_purpose(self, phase: str) -> dict[str, Cost]:
        """The costs of one phase."""
        return {purpose: cost for (of, purpose), cost in self.costs.items() if of == phase}

    def total(self, phase: str, keep: Callable[[str], bool] = lambda purpose: True) -> Cost:
        """The cost of one phase, of the purposes that `keep` takes."""
        kept = (cost for purpose, cost in self.by_purpose(phase).items() if keep(purpose))
        return sum(kept, Cost())
