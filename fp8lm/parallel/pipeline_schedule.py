"""Pipeline schedules as data: an ordered list of actions for every stage.

    F  forward          B  whole backward
    I  backward of the input only          W  the weight gradients, deferred from I

A stage holds one or more chunks of the model; chunk c of stage s is virtual stage c * p + s of the
model. Sends and receives follow from the order: an F needs the F of the previous virtual stage, a
B or I that of the next one.

    1f1b           one forward, one backward (PipeDream-flush): bubble (p-1) / (m + p-1)
    interleaved    v chunks per stage (Megatron-LM, arXiv 2104.04473): (p-1) / (v m + p-1)
    zb-h1          backward in two halves (Zero Bubble, arXiv 2401.10241): with F = I = W for m >= p
                   (p-1) / (3 m + p-1), with no more micro-batches in flight than 1f1b's first stage

Bubbles are idle time over total time, for p stages and m micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

COSTS: Mapping[str, float] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


@dataclass(frozen=True)
class Action:
    """One step of a stage: its kind (F, B, I, W), the micro-batch and the chunk."""

    kind: str
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


@dataclass(frozen=True)
class Schedule:
    """`stages[s]`: the actions of stage s; all stages have `num_chunks` chunks."""

    stages: tuple[tuple[Action, ...], ...]
    num_chunks: int = 1

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are computed separately."""
        return any(action.kind == "W" for action in self.stages[0])

    @property
    def in_flight(self) -> tuple[int, ...]:
        """The most micro-batches (of any chunk) whose activations each stage holds at once."""
        return tuple(map(_in_flight, self.stages))

    def __str__(self) -> str:
        width = max(len(str(action)) for stage in self.stages for action in stage)
        return "\n".join(" ".join(f"{action!s:{width}}" for action in s) for s in self.stages)


def one_forward_one_backward(num_stages: int, num_microbatches: int) -> Schedule:
    """1F1B: each stage does as many forwards as there are stages after it, then alternates."""

    def backward(stage: int, k: int) -> list[Action]:
        return [Action("B", k)]

    return _in_turns(num_stages, num_microbatches, backward)


def interleaved(num_stages: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """Megatron's order: p micro-batches through one chunk, then the same through the next.

    ValueError unless the micro-batches divide by the stages.
    """
    if num_microbatches % num_stages:
        raise ValueError(f"{num_microbatches} micro-batches do not divide by {num_stages} stages")
    total = num_microbatches * num_chunks
    ups = forwards(num_stages, num_microbatches, num_chunks)
    downs = [Action("B", up.microbatch, num_chunks - 1 - up.chunk) for up in ups]
    stages = []
    for stage in range(num_stages):
        ahead = min(2 * (num_stages - stage - 1) + (num_chunks - 1) * num_stages, total)
        actions = ups[:ahead]
        for i in range(total):
            actions += ups[ahead + i : ahead + i + 1]
            actions.append(downs[i])
        stages.append(tuple(actions))
    return Schedule(tuple(stages), num_chunks)


def forwards(num_stages: int, num_microbatches: int, num_chunks: int) -> list[Action]:
    """All forwards of a stage: p micro-batches through each chunk in turn, any number in all."""
    return [
        Action("F", k, chunk)
        for first in range(0, num_microbatches, num_stages)
        for chunk in range(num_chunks)
        for k in range(first, min(first + num_stages, num_microbatches))
    ]


def zero_bubble(num_stages: int, num_microbatches: int) -> Schedule:
    """ZB-H1: the order of 1f1b, with backward split into input and weight gradients.

    Stage s defers s weight gradients, which fill the gaps in which it would wait for later
    stages: no more than p micro-batches are in flight, from their F to their W.
    """

    def backward(stage: int, k: int) -> list[Action]:
        actions = [Action("I", k)]
        if k >= stage:
            actions.append(Action("W", k - stage))
        if k == num_microbatches - 1:
            left = range(max(0, num_microbatches - stage), num_microbatches)
            actions += [Action("W", late) for late in left]
        return actions

    return _in_turns(num_stages, num_microbatches, backward)


def _in_turns(
    num_stages: int, num_microbatches: int, backward: Callable[[int, int], list[Action]]
) -> Schedule:
    """1f1b with `backward(stage, k)` in place of the backward of micro-batch k."""
    stages = []
    for stage in range(num_stages):
        ahead = min(num_stages - stage - 1, num_microbatches)
        actions = [Action("F", k) for k in range(ahead)]
        for k in range(num_microbatches):
            if k + ahead < num_microbatches:
                actions.append(Action("F", k + ahead))
            actions += backward(stage, k)
        stages.append(tuple(actions))
    return Schedule(tuple(stages))


@dataclass(frozen=True)
class Trace:
    """Result of simulating a schedule: total time and its idle share.

    `bubble` is the same for all stages.
    """

    seconds: float
    bubble: float


def simulate(
    schedule: Schedule, num_microbatches: int, costs: Mapping[str, float] = COSTS
) -> Trace:
    """Simulate the schedule; ValueError for a deadlock, a missing or a surplus action.

    Each action of a chunk costs 1 / num_chunks of the whole stage's.
    """
    _check_complete(schedule, num_microbatches)
    num_stages = len(schedule.stages)
    position, clock = [0] * num_stages, [0.0] * num_stages
    done: dict[tuple[str, int, int], float] = {}
    moving = True
    while moving:
        moving = False
        for stage, actions in enumerate(schedule.stages):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                needs = _needs(schedule, stage, action)
                if any(need not in done for need in needs):
                    break
                start = max([clock[stage], *(done[need] for need in needs)])
                clock[stage] = start + costs[action.kind] / schedule.num_chunks
                done[_result(schedule, stage, action)] = clock[stage]
                position[stage] += 1
                moving = True
    for stage, actions in enumerate(schedule.stages):
        if position[stage] < len(actions):
            action = actions[position[stage]]
            raise ValueError(f"deadlock: stage {stage} waits for ever to do {action}")
    seconds = max(clock)
    busy = sum(costs[action.kind] for action in schedule.stages[0]) / schedule.num_chunks
    return Trace(seconds, 1.0 - busy / seconds)


def early_receives(schedule: Schedule) -> tuple[frozenset[int], ...]:
    """Of every stage the numbers of the actions whose message it may ask for one action ahead.

    What arrives while the action before is computed costs no time. But a GPU may have to stop for
    all that it was given, to free memory or to load a kernel, and then waits for that message too
    in the middle of an action: it must not follow from this action, on whatever way. So these are
    found by a run in which every stage does wait. Where all would stop, one gradient (else one
    activation) is not asked for ahead: in 1F1B neighbours work on what the other needs next, and
    one of them has to be able to finish.
    """
    late: set[tuple[int, int]] = set()
    position = [0] * len(schedule.stages)
    done: set[tuple[str, int, int]] = set()
    moving = True
    while moving:
        moving, waiting = False, []
        for stage, actions in enumerate(schedule.stages):
            while position[stage] < len(actions):
                number = position[stage]
                if not done.issuperset(_needs(schedule, stage, actions[number])):
                    break
                ahead = [received(schedule, stage, action) for action in actions[number + 1 :][:1]]
                if (stage, number + 1) not in late and not done.issuperset(filter(None, ahead)):
                    waiting.append((stage, number + 1))
                    break
                done.add(_result(schedule, stage, actions[number]))
                position[stage] += 1
                moving = True
        if waiting and not moving:
            late.add(min(waiting, key=lambda one: schedule.stages[one[0]][one[1]].kind == "F"))
            moving = True
    return tuple(
        frozenset(
            number
            for number, action in enumerate(actions)
            if number and (stage, number) not in late and received(schedule, stage, action)
        )
        for stage, actions in enumerate(schedule.stages)
    )


def received(schedule: Schedule, stage: int, action: Action) -> tuple[str, int, int] | None:
    """What the action needs of another stage: its kind, virtual stage and micro-batch."""
    virtual = action.chunk * len(schedule.stages) + stage
    others = [need for need in _needs(schedule, stage, action) if need[1] != virtual]
    return others[0] if others else None


def _check_complete(schedule: Schedule, num_microbatches: int) -> None:
    kinds = "FIW" if schedule.splits_backward else "FB"
    wanted = {
        Action(kind, k, chunk)
        for kind in kinds
        for k in range(num_microbatches)
        for chunk in range(schedule.num_chunks)
    }
    for stage, actions in enumerate(schedule.stages):
        if len(actions) != len(wanted) or set(actions) != wanted:
            raise ValueError(f"stage {stage} does not do every action once")


def _needs(schedule: Schedule, stage: int, action: Action) -> list[tuple[str, int, int]]:
    virtual = action.chunk * len(schedule.stages) + stage
    last = schedule.num_chunks * len(schedule.stages) - 1
    k = action.microbatch
    if action.kind == "F":
        return [("F", virtual - 1, k)] if virtual else []
    if action.kind == "W":
        return [("I", virtual, k)]
    return [("F", virtual, k)] + ([("I", virtual + 1, k)] if virtual < last else [])


def _result(schedule: Schedule, stage: int, action: Action) -> tuple[str, int, int]:
    kind = "I" if action.kind == "B" else action.kind
    return kind, action.chunk * len(schedule.stages) + stage, action.microbatch


def _in_flight(actions: Sequence[Action]) -> int:
    releases = "W" if any(action.kind == "W" for action in actions) else "B"
    held = most = 0
    for action in actions:
        held += (action.kind == "F") - (action.kind == releases)
        most = max(most, held)
    return most
