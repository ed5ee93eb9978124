"""Text of tokens that arrive one by one, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from fp8lm.data.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # what a decoder makes of a part of a character


class GrowingText:
    """The text that follows the tokens `prompt`; `stops` end it and are no part of it.

    Decoded together with the prompt, as a tokenizer may treat the first token of a text specially.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._prompt, self._stops = tokenizer, list(prompt), stops
        self._start = tokenizer.detokenize(self._prompt)
        self._new: list[int] = []
        self._given = 0
        self.text = ""
        self.stopped = False

    @property
    def whole(self) -> str:
        """The prompt's text and this."""
        return self._start + self.text

    def add(self, token: int) -> None:
        """One more token."""
        self._new.append(token)
        whole = self._tokenizer.detokenize([*self._prompt, *self._new])
        # Where a prompt ends within a character its text changes with the next token.
        shared = len(self._start.rstrip(INCOMPLETE))
        if len(self._start) != shared and not whole.startswith(self._start):
            self._start = self._start[:shared]
        self.text = whole[len(self._start) :]
        found = [place for stop in self._stops if (place := self.text.find(stop)) >= 0]
        if found:
            self.stopped, self.text = True, self.text[: min(found)]

    def take(self, *, final: bool = False) -> str:
        """What is certain and was not taken yet; all that is left if `final`."""
        certain = len(self.text)
        if not final:
            if self.text.endswith(INCOMPLETE):
                certain = len(self.text.rstrip(INCOMPLETE))
            certain = min(certain, *(self._before(stop) for stop in self._stops), certain)
        piece, self._given = self.text[self._given : certain], max(self._given, certain)
        return piece

    def _before(self, stop: str) -> int:
        """Length of the text without an end that may become `stop`."""
        for size in range(min(len(stop) - 1, len(self.text)), 0, -1):
            if self.text.endswith(stop[:size]):
                return len(self.text) - size
        return len(self.text)
