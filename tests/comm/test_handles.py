"""Handles: one result, once, and a complaint about those that nobody waited for."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from fp8lm.comm import Handle
from fp8lm.runtime.errors import EXIT_INTERRUPTED, run_command


def test_wait_gives_the_result_once():
    handle = Handle.done(3)
    assert handle.wait() == 3
    with pytest.raises(RuntimeError, match="waited for already"):
        handle.wait()


def test_then_runs_at_wait_and_takes_the_place_of_the_first():
    order = []
    first = Handle(lambda: order.append("bytes") or 3)
    second = first.then(lambda value: order.append("sum") or value + 1)
    assert order == []
    with pytest.raises(RuntimeError, match="waited for already"):
        first.wait()
    assert second.wait() == 4
    assert order == ["bytes", "sum"]


def test_what_is_sent_is_held_until_wait_and_no_longer():
    sent = torch.ones(3)
    alive = weakref.ref(sent)
    handle = Handle(lambda sent=sent: sent.sum())
    del sent
    gc.collect()
    assert alive() is not None
    handle.wait()
    assert alive() is None


def test_a_forgotten_handle_is_told():
    handle = Handle.done(3).then(lambda value: value)
    with pytest.warns(RuntimeWarning, match="never waited for"):
        del handle


def test_a_handle_that_an_exception_leaves_behind_is_not(recwarn):
    def fail():
        handle = Handle.done(3)
        raise KeyboardInterrupt
        handle.wait()

    def main(argv):
        fail()

    assert run_command(main, []) == EXIT_INTERRUPTED
    gc.collect()
    assert not recwarn.list
