"""Text that grows token by token: stop strings, parts of characters, and what streams of it."""

from __future__ import annotations

from fp8lm.generate.text import GrowingText


class Bytes:
    """Every byte is a token."""

    def detokenize(self, ids):
        return bytes(ids).decode(errors="replace")


def grow(text, prompt="ab", stops=()):
    """The pieces that stream, and the text itself."""
    growing = GrowingText(Bytes(), list(prompt.encode()), stops)
    pieces = []
    for token in text.encode():
        growing.add(token)
        pieces.append(growing.take())
        if growing.stopped:
            break
    return [*pieces, growing.take(final=True)], growing


def test_pieces_make_up_the_text():
    pieces, growing = grow("cdéf€")
    assert pieces == ["c", "d", "", "é", "f", "", "", "€", ""]
    assert growing.text == "cdéf€" and growing.whole == "abcdéf€"


def test_a_stop_string_and_what_may_become_one_do_not_stream():
    pieces, growing = grow("x\nUses\nUser:more", stops=("\nUser:", "zz"))
    assert "".join(pieces) == growing.text == "x\nUses" and growing.stopped
    assert pieces[1:5] == ["", "", "", ""]
    pieces, growing = grow("x\nUse", stops=("\nUser:",))
    assert "".join(pieces) == "x\nUse" and not growing.stopped


def test_the_first_of_several_stop_strings():
    _, growing = grow("one two three", stops=("three", " two"))
    assert growing.text == "one"


def test_a_prompt_that_ends_within_a_character():
    prompt, first, rest = b"a", "é".encode()[:1], "é".encode()[1:]
    growing = GrowingText(Bytes(), list(prompt + first), ())
    growing.add(rest[0])
    assert growing.whole == "aé"
