"""Documents of any length into rows of one length."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64


@dataclass(frozen=True)
class Rows:
    """Which stretches of the token stream make up each row.

    Row r holds stretches `first[r]` to `first[r + 1]`, one after another; a stretch of n tokens also reads the token
    that follows it, its last target.
    """

    first: Int64[np.ndarray, "rows_and_one"]
    start: Int64[np.ndarray, "stretches"]
    length: Int32[np.ndarray, "stretches"]

    def __len__(self) -> int:
        return len(self.first) - 1


def pack(starts: Int64[np.ndarray, "documents"], ends: Int64[np.ndarray, "documents"], seq_len: int) -> Rows:
    """Rows of at most `seq_len` tokens that predict every token of the stream's documents but their first.

    A document that fits a row is never cut; a longer one gives whole rows and a tail. Documents and tails go, longest
    first, where they leave the least room.
    """
    predicted = ends - starts - 1
    whole = predicted // seq_len
    # Whole rows: the k-th of a document starts k rows after it. In place: there may be millions.
    full_start = np.repeat(starts - (np.cumsum(whole) - whole) * seq_len, whole)
    full_start += np.arange(0, len(full_start) * seq_len, seq_len)

    tail_length = predicted - whole * seq_len
    tail_start = (starts + whole * seq_len)[tail_length > 0]
    tail_length = tail_length[tail_length > 0]
    row = _best_fit(tail_length, seq_len)

    order = np.argsort(row, kind="stable")
    counts = np.bincount(row)
    first = np.arange(len(full_start) + len(counts) + 1)
    np.cumsum(counts, out=first[len(full_start) + 1 :])
    first[len(full_start) + 1 :] += len(full_start)
    length = np.full(len(full_start) + len(order), seq_len, np.int32)
    length[len(full_start) :] = tail_length[order]
    return Rows(first, np.concatenate([full_start, tail_start[order]]), length)


def permute(rows: Rows, seed: int) -> Rows:
    """The same rows in an order that has nothing to do with the documents', so that any part is a fair sample."""
    order = np.random.default_rng(seed).permutation(len(rows))
    counts = np.diff(rows.first)[order]
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    taken = np.repeat(rows.first[:-1][order] - first[:-1], counts) + np.arange(first[-1])
    return Rows(first, rows.start[taken], rows.length[taken])


def _best_fit(lengths: Int64[np.ndarray, "items"], capacity: int) -> Int64[np.ndarray, "items"]:
    """A row for each item, by best fit, longest first; items of one length go together."""
    result = np.zeros(len(lengths), np.int64)
    if not len(lengths):
        return result
    rows_by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
    # Bit r is set while some row has r tokens of room: the lowest set bit from an item's length up is its best fit.
    rooms = 0
    count = 0

    def leave(room: int, rows: np.ndarray) -> None:
        nonlocal rooms
        if room and len(rows):
            rows_by_room[room].append(rows)
            rooms |= 1 << room

    order = np.argsort(-lengths, kind="stable")
    distinct, firsts = np.unique(-lengths[order], return_index=True)
    for negative, items in zip(distinct.tolist(), np.split(order, firsts[1:]), strict=True):
        length = -negative
        while len(items) and (fitting := rooms >> length):
            room = length + (fitting & -fitting).bit_length() - 1
            rows = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
            used = rows[: len(items)]
            result[items[: len(used)]] = used
            items = items[len(used) :]
            leave(room - length, used)
            leave(room, rows[len(used) :])
        if len(items):
            each = capacity // length
            rows = np.arange(count, count - (-len(items) // each))
            count += len(rows)
            result[items] = np.repeat(rows, each)[: len(items)]
            full, rest = divmod(len(items), each)
            leave(capacity - each * length, rows[:full])
            leave(capacity - rest * length, rows[full:])
    return result
