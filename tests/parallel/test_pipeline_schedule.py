"""Schedules without processes: complete, free of deadlock, their bubbles and micro-batches held."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fp8lm.parallel.pipeline_schedule import (
    Action,
    Schedule,
    early_receives,
    forwards,
    interleaved,
    one_forward_one_backward,
    received,
    simulate,
    zero_bubble,
)

STAGES = range(1, 17)
MICROBATCHES = (1, 2, 3, 5, 8, 13, 16, 32, 64)


@pytest.mark.parametrize("p", STAGES)
def test_1f1b(p):
    for m in MICROBATCHES:
        schedule = one_forward_one_backward(p, m)
        assert simulate(schedule, m).bubble == pytest.approx((p - 1) / (m + p - 1))
        assert schedule.in_flight == tuple(min(p - s, m) for s in range(p))


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("p", STAGES)
def test_interleaved(p, chunks):
    for m in (p, 2 * p, 4 * p):
        schedule = interleaved(p, m, chunks)
        assert simulate(schedule, m).bubble == pytest.approx((p - 1) / (chunks * m + p - 1))
        most = 2 * (p - 1) + (chunks - 1) * p + 1
        assert schedule.in_flight[0] == min(most, m * chunks)


@pytest.mark.parametrize("p", STAGES)
def test_zero_bubble(p):
    costs = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}
    for m in MICROBATCHES:
        schedule = zero_bubble(p, m)
        trace = simulate(schedule, m, costs)
        whole = simulate(one_forward_one_backward(p, m), m, costs)
        assert max(schedule.in_flight) <= p
        assert trace.seconds <= whole.seconds
        if m >= p:
            assert trace.bubble == pytest.approx((p - 1) / (3 * m + p - 1))


def asked_ahead(schedule, kinds):
    """How many messages of actions of `kinds` are asked for ahead, and how many could be."""
    numbers = [
        (number, early)
        for stage, early in enumerate(early_receives(schedule))
        for number, action in enumerate(schedule.stages[stage])
        if number and action.kind in kinds and received(schedule, stage, action)
    ]
    return sum(number in early for number, early in numbers), len(numbers)


@pytest.mark.parametrize("p", range(2, 9))
def test_activations_are_asked_for_ahead(p):
    for m in (p, 4 * p):
        for schedule in (one_forward_one_backward(p, m), zero_bubble(p, m)):
            asked, all_ = asked_ahead(schedule, "F")
            assert asked == all_ == (p - 1) * (m - 1)


@pytest.mark.parametrize("p", range(2, 9))
def test_most_messages_are_asked_for_ahead_where_there_is_time(p):
    """In 1F1B neighbours need each other's result at once, and one of them asks late."""
    m = 8 * p
    for schedule in (zero_bubble(p, m), interleaved(p, m, 2), interleaved(p, m, 3)):
        asked, all_ = asked_ahead(schedule, "FBI")
        assert asked >= 0.85 * all_


@pytest.mark.parametrize("p", range(2, 9))
def test_an_answer_is_not_asked_for_ahead(p):
    """The gradient of the only micro-batch follows from its forward, which goes before it."""
    for schedule in (one_forward_one_backward(p, 1), zero_bubble(p, 1)):
        assert early_receives(schedule) == (frozenset(),) * p


def ends(p, m, chunks):
    """When stages of unit speed that only do forwards are done, by arithmetic of its own."""
    done, clock = {}, [0] * p
    left = [list(forwards(p, m, chunks)) for _ in range(p)]
    while any(left):
        for stage, todo in enumerate(left):
            while todo:
                virtual = todo[0].chunk * p + stage
                before = done.get((virtual - 1, todo[0].microbatch), None if virtual else 0)
                if before is None:
                    break
                clock[stage] = done[virtual, todo[0].microbatch] = max(clock[stage], before) + 1
                todo.pop(0)
    return max(clock)


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_forwards_alone_fill_the_pipeline(p, chunks):
    for m in (p, 2 * p, 8 * p):
        assert ends(p, m, chunks) == m * chunks + p - 1
    for m in (1, p + 1, 3 * p - 1):  # the last group may have gaps
        assert m * chunks + p - 1 <= ends(p, m, chunks) <= (m + p) * chunks + p - 1


def test_it_prints_like_the_figure():
    assert str(one_forward_one_backward(3, 4)).splitlines() == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    assert str(interleaved(2, 2, 2)).splitlines()[0] == "F0   F1   F0.1 F1.1 B0.1 B1.1 B0   B1  "


def test_micro_batches_must_divide():
    with pytest.raises(ValueError, match="3 micro-batches do not divide by 2 stages"):
        interleaved(2, 3, 2)


def test_a_deadlock_is_named():
    good = one_forward_one_backward(2, 2)
    first, second = good.stages
    # Stage 1 wants micro-batch 1 forward before stage 0, which waits for the backward of 0.
    stuck = (Action("F", 0), Action("B", 0), Action("F", 1), Action("B", 1))
    late = (Action("F", 0), Action("F", 1), Action("B", 0), Action("B", 1))
    with pytest.raises(ValueError, match=r"deadlock: stage [01]"):
        simulate(Schedule((stuck, late)), 2)
    with pytest.raises(ValueError, match=r"stage 1 .*once"):
        simulate(replace(good, stages=(first, second[:-1])), 2)
    with pytest.raises(ValueError, match=r"stage 0 .*once"):
        simulate(replace(good, stages=(first + first[:1], second)), 2)
