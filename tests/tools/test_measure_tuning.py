"""Examples from the standard library, and what is reported of tuning on them."""

from __future__ import annotations

import json
import re

import pytest

from fp8lm.runtime.errors import EXIT_BAD_INPUT


def test_examples_of_two_forms_of_which_the_question_decides(run_tool, tool, tmp_path, capsys):
    (tmp_path / "sources").mkdir()
    source = "".join(f"def f{i}({'ab'[: i % 2]}): pass\n" for i in range(200))
    (tmp_path / "sources/a.py").write_text(source)
    (tmp_path / "sources/b.py").write_text("def broken(:")
    own = ("--output", tmp_path, "--sources", tmp_path / "sources")
    assert run_tool("build_instructions", *own, "--count", "40") == 0
    chats, pairs = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("chats", "pairs")
    )
    assert len(chats) == len(pairs) == 40
    asked = [fields["messages"][0]["content"] for fields in chats]
    assert not set(asked) & {fields["prompt"][0]["content"] for fields in pairs}
    answers = [fields["messages"][1]["content"] for fields in chats]
    assert all(re.fullmatch(tool("build_instructions").FORMAT, answer) for answer in answers)
    assert 10 < sum(answer.startswith("It is") for answer in answers) < 30
    for fields in pairs:
        without = re.search(r"\((self|cls)?\):", fields["prompt"][0]["content"]) is not None
        chosen, rejected = (fields[side][0]["content"] for side in ("chosen", "rejected"))
        assert chosen.startswith("`") == without == rejected.startswith("It is")
    assert run_tool("build_instructions", *own, "--count", "999999") == EXIT_BAD_INPUT
    assert "lower it" in capsys.readouterr().err


def test_gaps_are_of_pairs_of_seeds(tool, tmp_path):
    folders = {}
    for preset, losses in {"bf16": (1.0, 2.0, 3.0), "o3": (1.1, 2.1, 3.4)}.items():
        folders[preset] = []
        for number, loss in enumerate(losses):
            folder = tmp_path / f"{preset}{number}"
            folder.mkdir()
            lines = [
                {"lm loss validation": 5.0},
                {"state_bytes_per_parameter": 7.0},
                {"token accuracy validation": 0.1},
                {"lm loss validation": loss},
                {"token accuracy validation": 0.5},
            ]
            text = "".join(json.dumps({"iteration": 1, **line}) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text)
            folders[preset].append(folder)
    found = tool("measure_tuning").summary("sft", folders)
    assert found["bf16"]["before"]["lm loss"] == [5.0] * 3
    assert found["o3"]["after"]["lm loss"] == [1.1, 2.1, 3.4]
    gap = found["o3 - bf16"]["lm loss"]
    assert gap["mean"] == pytest.approx(0.2)
    # Student's t of two degrees of freedom, 4.303, times sqrt(0.03 / 3).
    assert gap["+-"] == pytest.approx(4.303 * 0.1, rel=1e-3)
