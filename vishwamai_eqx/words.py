"""Text as words, each of which comes again and again: found without a step of Python's for each.

A word is the spaces before it and what follows up to a space or the end of the line; spaces that end a line are one,
and so is the end of a line. Where no piece of a tokenizer reaches across the ends of words, a text's ids are those of
its words one after another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

# Words are told apart by sums of their bytes, each times the number of its place. Places further on share numbers.
_PLACES = 64
_NUMBERS = np.random.default_rng(0x30D5).integers(1 << 63, size=_PLACES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


class Words(NamedTuple):
    """The words of some texts."""

    words: list[str]
    """Each of them once."""
    which: Int64[np.ndarray, "all"]
    """Which one stands at each place of the texts."""
    ends: Int64[np.ndarray, "texts"]
    """At which place each text ends."""


def distinct(texts: Sequence[bytes]) -> Words | None:
    """The words of UTF-8 texts; None if they could not be told apart, which is not to be expected."""
    data = b"".join(texts)
    text_ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    if not data:
        return Words([], np.zeros(0, np.int64), np.zeros(len(texts), np.int64))
    content = np.frombuffer(data, np.uint8)
    space, line = content == ord(" "), content == ord("\n")
    begins = line.copy()
    begins[1:] |= line[:-1] | (space[1:] & ~space[:-1])
    begins[0] = True
    begins[text_ends[text_ends < len(data)]] = True
    starts = np.flatnonzero(begins).astype(np.int32)
    lengths = np.diff(starts, append=np.int32(len(data)))
    place = np.arange(len(data), dtype=np.int32) - np.repeat(starts, lengths)
    sums = np.add.reduceat((content + np.uint64(1)) * _NUMBERS[place % _PLACES], starts)
    _, first, which = np.unique(sums, return_index=True, return_inverse=True)
    begin, length = starts[first], lengths[first]
    # Two words with one sum would be one word: are those of a sum the same, byte for byte?
    if (length[which] != lengths).any() or (content[np.repeat(begin[which], lengths) + place] != content).any():
        return None
    words = [data[at:end].decode() for at, end in zip(begin.tolist(), (begin + length).tolist(), strict=True)]
    return Words(words, which, np.searchsorted(starts, text_ends))


def joined(pieces: Sequence[Sequence[int]], words: Words) -> list[Int32[np.ndarray, "_"]]:
    """Each text's ids, from those of each word."""
    sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
    ids = np.array([id for each in pieces for id in each], np.int32)
    starts, lengths = (np.cumsum(sizes) - sizes)[words.which], sizes[words.which]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    stream = ids[np.repeat(starts - ends[:-1], lengths) + np.arange(ends[-1])]
    return np.split(stream, ends[words.ends[:-1]]) if len(words.ends) else []
