"""What is broken, where it is not looked for, and that a broken line is put back."""

from __future__ import annotations

import ast
import json
import time
from contextlib import suppress

import psutil
import pytest

from fp8lm.runtime.errors import InputError

pytestmark = pytest.mark.slow

SOURCE = '''
"""A docstring with 1 number."""
from a import b

FLAG = True


def f(x: int = 1) -> int:
    """Another."""
    if x < 2:
        raise ValueError("not 3" + str(4))
    groups.wait()
    total = g(x) + h(groups.tensor_parallel)
    return min(total, 5) if x else total
'''
EXPECTED = {
    ("constant", "FLAG = False"),
    ("constant", "def f(x: int = 2) -> int:"),
    ("compare", "if (x <= 2):"),
    ("constant", "if x < 3:"),
    ("call", "pass"),
    ("argument", "total = x + h(groups.tensor_parallel)"),
    ("argument", "total = g(x) + groups.tensor_parallel"),
    ("arithmetic", "total = (g(x) - h(groups.tensor_parallel))"),
    ("group", "total = g(x) + h(groups.data_parallel)"),
    ("choice", "return (total if x else min(total, 5))"),
    ("choice", "return max(total, 5) if x else total"),
    ("constant", "return min(total, 6) if x else total"),
}


@pytest.fixture
def mutate(tool):
    return tool("mutate")


def test_every_slip_of_a_line_and_no_other(mutate):
    found = list(mutate.mutations_of(SOURCE, "f.py"))
    assert {(m.kind, m.after) for m in found} == EXPECTED
    for mutation in found:
        assert SOURCE.splitlines()[mutation.line - 1].strip() == mutation.before


def test_a_draw_repeats_and_has_no_line_twice_alike(mutate):
    first, again = (mutate.draw(mutate.ROOT, ["fp8lm/comm"], 40, 3) for _ in range(2))
    assert first == again != mutate.draw(mutate.ROOT, ["fp8lm/comm"], 40, 4)
    assert len(set(first)) == 40 and len({mutation.kind for mutation in first}) >= 5


@pytest.mark.parametrize(("under", "count"), [("fp8lm/nothing", 1), ("fp8lm/comm/amax.py", 10**6)])
def test_bad_draws(mutate, under, count):
    with pytest.raises(InputError):
        mutate.draw(mutate.ROOT, [under], count, 1)


def test_a_broken_line_is_noticed_and_put_back(mutate, tmp_path):
    source = "def double(x):\n    return x * 2\n"
    (tmp_path / "code.py").write_text(source)
    (tmp_path / "test_code.py").write_text(
        "from code_of import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
    )
    (tmp_path / "code.py").rename(tmp_path / "code_of.py")
    assert mutate.run_tests(tmp_path, ["test_code.py"], 60) is None
    for mutation in mutate.mutations_of(source, "code_of.py"):
        with mutate.mutated(tmp_path, mutation):
            ast.parse((tmp_path / "code_of.py").read_text())
            caught = mutate.run_tests(tmp_path, ["test_code.py"], 60)
            assert caught == "FAILED test_code.py::test_double"
        assert (tmp_path / "code_of.py").read_text() == source


SLEEPER = """
import subprocess, sys, time

def test_that_hangs():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, file=open("child", "w"), flush=True)
    time.sleep(600)
"""


def test_what_hangs_is_ended_with_all_that_it_started(mutate, tmp_path):
    (tmp_path / "test_sleeper.py").write_text(SLEEPER)
    assert mutate.run_tests(tmp_path, ["test_sleeper.py"], 5) == "still running after 5 s"
    child, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 10
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_command_lists_what_it_would_break(run_tool, capsys):
    assert run_tool("mutate", "--list", "--count", "2") == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_what_was_tried_is_not_tried_again(mutate, tmp_path, monkeypatch):
    tried = []

    def run_tests(*arguments):
        tried.append(arguments)
        return "FAILED somewhere"

    monkeypatch.setattr(mutate, "run_tests", run_tests)
    command = ["--under", "fp8lm/comm/dims.py", "--json", str(tmp_path / "outcomes.json")]
    assert mutate.main([*command, "--count", "2"]) == 0
    assert mutate.main([*command, "--count", "3"]) == 0
    assert len(tried) == 3
    assert json.loads((tmp_path / "outcomes.json").read_text())["caught"] == 3
