"""The text of tokens that come a few at a time, and where it ends."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Decodes(Protocol):
    """A tokenizer, for who only wants text of it."""

    def decode(self, ids: list[int]) -> str: ...


class Text:
    """Text that grows; what may still change or turn out to be past the end is held back.

    That is the bytes of a character that is not whole yet, and the beginning of a stop string.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.shown = ""
        self.stopped = False

    def add(self, ids: list[int], last: bool = False) -> str:
        """What there is to show now; after a stop string no token is taken, and the one that completed it is the last.

        Of `last` nothing is held back.
        """
        before = len(self.ids)
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        if (at := self._end(text)) is not None:
            # The fewest of the new tokens that have it.
            while len(self.ids) > before + 1 and self._end(self.tokenizer.decode(self.ids[:-1])) is not None:
                self.ids.pop()
            text, self.stopped = text[:at], True
        elif not last:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - self._begun(text)]
        new, self.shown = text[len(self.shown) :], text
        return new

    def _end(self, text: str) -> int | None:
        """Where the first stop string begins."""
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def _begun(self, text: str) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = 0
        for stop in self.stop:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
