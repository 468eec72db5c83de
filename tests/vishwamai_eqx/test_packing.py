"""Packing: every token predicted once, no document cut that fits, little room left."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vishwamai_eqx import packing


def bounds(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum(lengths, dtype=np.int64)
    return ends - np.array(lengths, np.int64), ends


@given(st.lists(st.integers(2, 90), min_size=1, max_size=60), st.integers(1, 40))
def test_every_token_but_the_first_is_predicted_once(lengths, seq_len):
    starts, ends = bounds(lengths)
    rows = packing.pack(starts, ends, seq_len)
    predicted = [
        start + 1 + offset for start, length in zip(rows.start, rows.length, strict=True) for offset in range(length)
    ]
    first = set(starts.tolist())
    assert sorted(predicted) == [token for token in range(ends[-1]) if token not in first]
    # A document is cut every seq_len tokens and nowhere else, so one that fits a row is whole.
    pieces = sorted(zip(rows.start.tolist(), rows.length.tolist(), strict=True))
    assert pieces == [
        (at, min(seq_len, end - 1 - at))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        for at in range(start, end - 1, seq_len)
    ]
    filled = np.add.reduceat(rows.length, rows.first[:-1])
    assert filled.max() <= seq_len
    # Best fit leaves no two rows that would go into one.
    if len(filled) > 1:
        assert np.sort(filled)[:2].sum() > seq_len


@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), st.integers(0, 5))
def test_permuted_rows_are_the_same_rows(lengths, seed):
    rows = packing.pack(*bounds(lengths), 16)
    permuted = packing.permute(rows, seed)

    def contents(rows: packing.Rows) -> list[list[tuple[int, int]]]:
        stretches = list(zip(rows.start.tolist(), rows.length.tolist(), strict=True))
        return [stretches[rows.first[r] : rows.first[r + 1]] for r in range(len(rows))]

    assert sorted(contents(permuted)) == sorted(contents(rows))


def test_a_document_goes_where_it_leaves_least_room():
    starts, ends = bounds([7 + 1, 6 + 1, 3 + 1])
    rows = packing.pack(starts, ends, 10)
    assert [rows.length[rows.first[r] : rows.first[r + 1]].tolist() for r in range(len(rows))] == [[7, 3], [6]]


def test_padding_stays_under_three_percent():
    rng = np.random.default_rng(0)
    for mean in (30, 200, 2000):
        lengths = np.maximum(rng.lognormal(np.log(mean), 1.0, 20_000).astype(np.int64), 2).tolist()
        rows = packing.pack(*bounds(lengths), 1024)
        assert 1 - rows.length.sum() / (len(rows) * 1024) < 0.03
