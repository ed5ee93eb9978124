"""No order of messages that NCCL would wait for ever in.

NCCL does what two ranks of a group send each other in one order at both ends: a message travels
once it is the next at either. gloo does not mind, so real processes here would not show it. The
executor's own sends, receives and waits are recorded and played against each other by that rule.
"""

from __future__ import annotations

from collections import defaultdict, deque

import pytest
import torch

from fp8lm.batch import Batch
from fp8lm.comm import Handle
from fp8lm.comm.groups import PipelineGroups
from fp8lm.layers.weight_grad_store import WeightGradStore
from fp8lm.model.objectives import Objective
from fp8lm.parallel.pipeline import Pipeline
from fp8lm.parallel.stages import schedule_maker

CPU = torch.device("cpu")
ONE, SEVERAL = ("1f1b", 1), ("1f1b", 3)
EMPTY = Batch(*(torch.empty(1, 0) for _ in range(3)))


class Sum(Objective):
    """An objective."""

    def loss(self, output, batch):
        return output.sum()


class Stage:
    """A group in which this process is number `number` of `size`, by its name."""

    def __init__(self, name, number, size):
        self.name, self.number, self.size_ = name, number, size

    def rank(self):
        return self.number

    def size(self):
        return self.size_


class Recorder:
    """Takes the place of the wire: `operations` are what a stage did, in order."""

    def __init__(self, stage):
        self.stage, self.operations = stage, []

    def send(self, x, to, group):
        number = len(self.operations)
        self.operations.append(("send", self._channel(group, to)))
        return Handle(lambda: self.operations.append(("wait", number)))

    def receive(self, source, group, device):
        number = len(self.operations)
        self.operations.append(("receive", self._channel(group, source)))

        def arrive():
            self.operations.append(("wait", number))
            return torch.ones(1, 1, 1)

        return Handle(arrive)

    def _channel(self, group, other):
        return group.name, frozenset((self.stage, other))


def operations(kind, stages, microbatches, stage, names=("up", "down"), training=True):
    groups = PipelineGroups(*(Stage(name, stage, stages) for name in names), None)
    chunk = [lambda h, batch: (torch.ones(1, 1, 1, requires_grad=True) if h is None else h) * 1]
    last = [lambda h, batch: h] if stage == stages - 1 else chunk
    name, chunks = kind
    run = schedule_maker(name, stages, chunks)
    wire = Recorder(stage)
    pipeline = Pipeline(
        chunk * (chunks - 1) + last, run, groups, wire, CPU, WeightGradStore(), None
    )
    if training:
        pipeline.train([EMPTY] * microbatches, Sum(), lambda: None)
    else:
        pipeline.evaluate([EMPTY] * microbatches, Sum())
    return wire.operations


def play(stages, stops=False):
    """Run the stages' operations against each other; how many of each are left undone.

    `stops`: every stage waits for all that it was given before it sends.
    """
    position, waiting = [0] * len(stages), defaultdict(deque)
    done, moving = set(), True
    while moving:
        moving = False
        for stage, todo in enumerate(stages):
            while position[stage] < len(todo):
                number = position[stage]
                kind, what = todo[number]
                if kind != "wait" and (stage, number) not in done:
                    queue = waiting[what, stage]
                    if (kind, number) not in queue:
                        queue.append((kind, number))
                        moving = True
                # A device that stops in an action waits for all messages that were asked for.
                asked = [(stage, i) for i in range(number) if todo[i][0] == "receive"]
                needed = {"send": asked if stops else [], "receive": [], "wait": [(stage, what)]}
                if not done.issuperset(needed[kind]):
                    break
                position[stage] += 1
                moving = True
        for (channel, stage), queue in list(waiting.items()):
            (other,) = channel[1] - {stage}
            opposite = waiting[channel, other]
            while queue and opposite and queue[0][0] == "send" and opposite[0][0] == "receive":
                done |= {(stage, queue.popleft()[1]), (other, opposite.popleft()[1])}
                moving = True
    return [len(todo) - reached for todo, reached in zip(stages, position, strict=True)]


@pytest.mark.parametrize("kind", [ONE, ("zb-h1", 1), ("1f1b", 2), SEVERAL], ids=str)
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_no_stage_waits_for_ever(kind, stages):
    for microbatches in (stages, 2 * stages, 4 * stages):
        played = [operations(kind, stages, microbatches, stage) for stage in range(stages)]
        assert all(len(done) >= microbatches for done in played)
        assert play(played) == play(played, stops=True) == [0] * stages


@pytest.mark.parametrize("kind", [ONE, ("zb-h1", 1)], ids=str)
@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_few_micro_batches_do_not_wait_for_ever(kind, microbatches):
    played = [operations(kind, 4, microbatches, stage) for stage in range(4)]
    assert play(played) == play(played, stops=True) == [0] * 4


@pytest.mark.parametrize("kind", [ONE, ("1f1b", 2), SEVERAL], ids=str)
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_no_stage_waits_for_ever_in_an_evaluation(kind, stages):
    for microbatches in (1, stages, stages + 1, 4 * stages - 1):
        played = [
            operations(kind, stages, microbatches, stage, training=False) for stage in range(stages)
        ]
        assert all(len(done) >= microbatches for done in played)
        assert play(played) == play(played, stops=True) == [0] * stages


def test_messages_are_asked_for_before_the_action_before_theirs():
    """Between its asking and its waiting the last stage sends the gradient of another one."""
    done = operations(ONE, 4, 16, stage=3)
    waits = {what: number for number, (kind, what) in enumerate(done) if kind == "wait"}
    receives = [number for number, (kind, _) in enumerate(done) if kind == "receive"]
    beside = [
        any(kind == "send" for kind, _ in done[number : waits[number]]) for number in receives
    ]
    assert not beside[0] and all(beside[1:])


@pytest.mark.parametrize("kind", [("1f1b", 2), SEVERAL], ids=str)
def test_with_one_group_they_would(kind):
    played = [operations(kind, 2, 4, stage, names=("both", "both")) for stage in range(2)]
    assert min(play(played)) > 0
