"""What a corpus takes in memory: a little for each document, and nothing for its length."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vishwamai_eqx import data, near_duplicates
from vishwamai_eqx.config import DataConfig
from vishwamai_eqx.corpus import DOCUMENT, Corpus, choose_held_out
from vishwamai_eqx.token_cache import TokenStream
from vishwamai_eqx.tokenizer import VishwamAITokenizer

COUNT = 50_000
# Ten gigabytes in documents of 2,200 bytes, rather short ones for prose, may take a gigabyte. A quarter of it is for
# what does not grow with them, which the slow test measures.
DOCUMENTS, ROOM = 10e9 / 2200, 750e6


def peak(work: Callable[[], Any]) -> tuple[float, Any]:
    """The most bytes a document that numpy held meanwhile, and what came of it."""
    tracemalloc.start()
    try:
        made = work()
        return tracemalloc.get_traced_memory()[1] / COUNT, made
    finally:
        tracemalloc.stop()


def test_ten_gigabytes_fit_a_gigabyte(monkeypatch):
    """Text is read, hashed and tokenized block by block; what knows of all documents at once is numpy's, and here."""
    rng = np.random.default_rng(0)
    digests = rng.integers(1 << 63, size=COUNT, dtype=np.uint64)
    sizes = rng.integers(100, 4300, size=COUNT)
    sketches = rng.integers(1 << 16, size=(COUNT, near_duplicates.MINIMA), dtype=np.uint16)
    grouping, groups = peak(lambda: near_duplicates.groups(digests, sketches))
    choosing, held_out = peak(lambda: choose_held_out(digests, sizes, groups, 0.05, 0))
    source, first = np.zeros(COUNT, np.int32), np.array([0, COUNT])
    corpus = Corpus((Path("text.jsonl"),), first, source, digests, sizes, held_out, DataConfig())
    ends = np.cumsum(sizes // 4 + 2)
    stream = TokenStream(np.zeros(ends[-1], np.uint16), ends - sizes // 4 - 2, ends)
    monkeypatch.setattr(data, "tokenize", lambda *_: stream)
    tokenizer = VishwamAITokenizer(Path(__file__).parent / "huggingface")
    preparing, _ = peak(lambda: data.prepare(corpus, tokenizer, seq_len=1024, batch_size=8, seed=0))
    # Beside what is made there is what is known already.
    index = DOCUMENT.itemsize
    known = sum(array.itemsize for array in (digests, sizes, source, held_out, stream.starts, ends))
    worst = max(grouping + index, choosing + 2 * index, preparing + known)
    assert 60 < worst < ROOM / DOCUMENTS
