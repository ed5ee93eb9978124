"""Random layouts: what is drawn can be run, what differs is found, and a short run passes."""

from __future__ import annotations

import json

import pytest

from fp8lm.config import build_config, load_config


@pytest.fixture
def fuzz(tool):
    return tool("fuzz_layouts")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_run(run_tool, capsys):
    """A pipeline, then replicas, four steps in all, with two kills."""
    assert run_tool("fuzz_layouts", "--only", "1", "--seed", "9", "--max-processes", "2") == 0
    assert "1 of 1 cases passed" in capsys.readouterr().out


def test_cases_are_a_function_of_the_seed_and_of_all_kinds(fuzz):
    cases = [fuzz.draw(1, number, 8) for number in range(200)]
    assert [str(fuzz.draw(1, number, 8)) for number in range(200)] == [str(c) for c in cases]
    assert {case.precision for case in cases} == set(fuzz.PRECISIONS)
    objectives = {case.overrides.get("train.objective", "pretrain") for case in cases}
    assert objectives == {"pretrain", "sft", "dpo"}
    layouts = [phase.layout for case in cases for phase in case.phases]
    assert max(layout.processes for layout in layouts) == 8
    for size in ("tensor", "pipeline", "data"):
        assert {getattr(layout, size) for layout in layouts} == {1, 2, 4}
    keys = {key for layout in layouts for key in layout.keys}
    assert {"sequence_parallel", "pipeline_schedule", "partition", "node_size"} <= keys
    assert any(phase.kill_after is not None for case in cases for phase in case.phases)


def test_drawn_configs_are_valid(fuzz):
    for number in range(60):
        case = fuzz.draw(2, number, 8)
        for phase in case.phases:
            overrides = case.overrides | phase.layout.overrides
            config = load_config(
                "configs/gpt_tiny.yaml", [f"{k}={v}" for k, v in overrides.items()]
            )
            assert build_config(config.model_dump()) == config


def test_what_decides_about_owners_is_equal_where_sums_depend_on_them(fuzz):
    cases = [fuzz.draw(1, number, 8) for number in range(200)]
    depend = [case for case in cases if fuzz.sums_depend_on_owners(case.overrides, case.phases)]
    assert 3 < len(depend) < 100
    for case in depend:
        first, second = case.neutral
        assert all(first[key] == second[key] for key in fuzz.OWNERS)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda lines: lines[1].update({"lm loss": 2.2}), "lm loss"),
        (lambda lines: lines[1].pop("lm loss"), "lm loss"),
        (lambda lines: lines.pop(), "reports"),
        (lambda lines: lines.clear(), "reports"),
        (lambda lines: None, None),
    ],
)
def test_losses_that_differ_are_found(change, found, fuzz, tmp_path):
    lines = [{"iteration": step, "lm loss": 2.0} for step in (1, 2, 3)]
    for name in ("one", "several"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "several":
            change(lines)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
    problem = fuzz.compare_losses(tmp_path / "one", tmp_path / "several", 0.05)
    assert problem is None if found is None else found in problem
