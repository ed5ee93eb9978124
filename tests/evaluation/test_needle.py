"""A needle in a haystack: where it lies, what is scored, and the picture."""

from __future__ import annotations

import random

import pytest
from matplotlib import image

from fp8lm.evaluation.needle import NeedleReport, Trial, find_needles, heat_map
from fp8lm.runtime.errors import InputError

HAYSTACK = list(range(1000, 1100))


class Bytes:
    """Every byte is a token."""

    def tokenize(self, text):
        return list(text.encode())


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [60, 95])
def test_the_needle_lies_at_its_depth(depth, length):
    trial = Trial.draw(Bytes(), random.Random(1))
    passage = trial.passage(HAYSTACK, length, depth)
    assert len(passage.tokens) == length + len(trial.answer) and passage.scored == len(trial.answer)
    text = passage.tokens[: length - len(trial.question)]
    start = next(i for i, token in enumerate(text) if token < 1000)
    assert text[start : start + len(trial.needle)] == trial.needle
    room = len(text) - len(trial.needle)
    assert start == round(depth * room)
    assert text[:start] + text[start + len(trial.needle) :] == HAYSTACK[:room]
    # The needle holds the answer to the question, which ends where the answer begins.
    assert bytes(trial.needle).startswith(bytes([*trial.question, *trial.answer]))
    control = trial.without_needle(HAYSTACK, length)
    assert len(control.tokens) == len(passage.tokens)
    assert control.tokens[-len(trial.answer) :] == trial.answer


class Copier:
    """A model that knows the answer where the needle is among the last `reach` tokens."""

    context_length = 200

    def __init__(self, reach):
        self.reach, self.tokenizer = reach, Bytes()


def test_recall_and_gain_by_depth_and_length(tmp_path, monkeypatch):
    from fp8lm.evaluation import needle

    def score_all(model, passages, batch_size, what):
        return [score(model.reach, passage) for passage in passages]

    monkeypatch.setattr(needle, "score_all", score_all)
    text = tmp_path / "text.txt"
    text.write_text("x" * 200)
    report = find_needles(Copier(reach=80), text, [60, 180], [0.0, 0.5, 1.0], 4, 1)
    assert report.recall == [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    assert report.gain == [[9.0, 0.0], [9.0, 0.0], [9.0, 9.0]]


def score(reach, passage):
    """Certain of the answer if it is in sight, else 9 nats away from it."""
    before, answer = passage.tokens[: -passage.scored], passage.tokens[-passage.scored :]
    known = bytes(answer) in bytes(before[-reach:])

    class Scored:
        nats, is_greedy = (0.0, True) if known else (9.0, False)

    return Scored


@pytest.mark.parametrize(
    ("text", "lengths", "complaint"),
    [
        ("x" * 100, [300], "300 .*outside|tokens"),
        ("x" * 100, [20], "--needle-lengths 20 is outside"),
        ("x" * 50, [60], "has 50 tokens"),
        (b"\xff", [60], "UTF-8"),
    ],
)
def test_what_does_not_fit(tmp_path, text, lengths, complaint):
    file = tmp_path / "text.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=complaint):
        find_needles(Copier(100), file, lengths, [0.5], 1, 1)


def test_the_picture(tmp_path):
    report = NeedleReport([8, 16], [0.0, 1.0], 4, [[0.0, 1.0], [0.5, 1.0]], [[-1.0, 2], [0, 3]])
    heat_map({"a": report, "b": report}, tmp_path / "map.png")
    pixels = image.imread(tmp_path / "map.png")
    assert pixels.shape[0] > 500 and pixels[..., :3].std() > 0.1
