"""The corpus as one memory-mapped array of ids, made once for a text and a vocabulary."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int32, Int64, Integer, UInt64

from vishwamai_eqx.cache import MegabyteBar, locked
from vishwamai_eqx.corpus import Block, Corpus
from vishwamai_eqx.manifest import remove
from vishwamai_eqx.tokenizer import VishwamAITokenizer

# Text that is encoded, written and synchronised at a time.
CHUNK_CHARACTERS = 1 << 20
# SentencePiece lets go of the interpreter while it encodes.
WORKERS = os.cpu_count() or 1
# Raised when the stream would come out differently.
FORMAT = 2
# Of each document: where it ends in the stream, and the sum of all ids up to there, by which damage is found.
DOCUMENT = np.dtype([("end", np.int64), ("sum", np.uint64)])
# Ids that are added up at a time.
SUMMED = 1 << 22


@dataclass(frozen=True)
class TokenStream:
    """`[BOS]` pieces `[EOS]` of every document, one after another."""

    tokens: Integer[np.ndarray, "stream"]
    starts: Int64[np.ndarray, "documents"]
    ends: Int64[np.ndarray, "documents"]


def tokenize(corpus: Corpus, tokenizer: VishwamAITokenizer, cache_dir: Path) -> TokenStream:
    """The corpus's ids, from the cache or into it; what was cut short goes on where it stopped."""
    specials = f"{tokenizer.bos_id}-{tokenizer.eos_id}"
    folder = cache_dir / "tokens" / f"{FORMAT}-{corpus.fingerprint}-{tokenizer.fingerprint}-{specials}"
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    tokens_path, ends_path = folder / f"tokens.{dtype.name}", folder / "ends"
    with locked(folder):
        whole = _whole(tokens_path, ends_path, dtype, len(corpus.sizes))
        if len(whole) < len(corpus.sizes):
            _append(corpus, tokenizer, tokens_path, ends_path, dtype, whole)
    ends = np.ascontiguousarray(np.fromfile(ends_path, DOCUMENT)["end"])
    tokens = np.memmap(tokens_path, dtype, "r", shape=(int(ends[-1]),))
    return TokenStream(tokens, np.concatenate([[0], ends[:-1]]), ends)


def _whole(tokens_path: Path, ends_path: Path, dtype: np.dtype, documents: int) -> np.ndarray:
    """What is known of the first documents that are whole on disk; what lies behind them is cut off."""
    for path in (tokens_path, ends_path):
        if path.is_dir():
            remove(path)
        path.touch()
    found = np.fromfile(ends_path, DOCUMENT)[:documents]
    # Tokens are on disk before the ends that speak of them, and no document has fewer than two, unless the files are
    # damaged.
    ends = found["end"]
    right = (ends <= tokens_path.stat().st_size // dtype.itemsize) & (ends >= np.concatenate([[0], ends[:-1]]) + 2)
    found = found[: np.append(right, False).argmin()]
    found = found[: np.append(_sums(tokens_path, dtype, found["end"]) == found["sum"], False).argmin()]
    size = dtype.itemsize * (int(found["end"][-1]) if len(found) else 0)
    if ends_path.stat().st_size != found.nbytes or tokens_path.stat().st_size != size:
        os.truncate(ends_path, found.nbytes)
        os.truncate(tokens_path, size)
    return found


def _sums(tokens_path: Path, dtype: np.dtype, ends: Int64[np.ndarray, "documents"]) -> UInt64[np.ndarray, "documents"]:
    """The sum of all ids before each of the ends."""
    sums, before = np.zeros(len(ends), np.uint64), np.uint64(0)
    for start in range(0, int(ends[-1]) if len(ends) else 0, SUMMED):
        part = np.fromfile(tokens_path, dtype, SUMMED, offset=start * dtype.itemsize)
        running = before + np.cumsum(part, dtype=np.uint64)
        here = slice(*np.searchsorted(ends, [start, start + len(part)], side="right"))
        sums[here], before = running[ends[here] - start - 1], running[-1]
    return sums


def _append(
    corpus: Corpus,
    tokenizer: VishwamAITokenizer,
    tokens_path: Path,
    ends_path: Path,
    dtype: np.dtype,
    whole: np.ndarray,
) -> None:
    """Encode, on all cores, what comes after the documents that are there."""
    document, opening = len(whole), True
    end, total = (int(whole[name][-1]) if document else 0 for name in ("end", "sum"))
    with (
        ThreadPoolExecutor(WORKERS) as pool,
        tokens_path.open("ab") as tokens_file,
        ends_path.open("ab") as ends_file,
        MegabyteBar("tokenizing", int(corpus.sizes.sum())) as bar,
    ):
        bar.advance(int(corpus.sizes[:document].sum()))

        def write(blocks: list[Block], encoded: list[Int32[np.ndarray, "_"]]) -> None:
            nonlocal end, total, opening
            ends = []
            for block, ids in zip(blocks, encoded, strict=True):
                written = np.concatenate([[tokenizer.bos_id] * opening, ids, [tokenizer.eos_id] * block.last])
                tokens_file.write(written.astype(dtype).tobytes())
                end, total = end + len(written), total + int(written.sum())
                opening = block.last
                if block.last:
                    ends.append((end, total))
            _synchronise(tokens_file)
            ends_file.write(np.array(ends, DOCUMENT).tobytes())
            _synchronise(ends_file)
            bar.advance(sum(len(block.text.encode()) for block in blocks))

        # In order, and few at a time: what is read ahead is in memory.
        waiting: deque[tuple[list[Block], Future]] = deque()
        for blocks in _chunks(corpus.blocks(document)):
            waiting.append((blocks, pool.submit(tokenizer.encode_batch, [block.text for block in blocks])))
            if len(waiting) > 2 * WORKERS:
                blocks, future = waiting.popleft()
                write(blocks, future.result())
        for blocks, future in waiting:
            write(blocks, future.result())


def _chunks(blocks: Iterator[Block]) -> Iterator[list[Block]]:
    chunk, size = [], 0
    for block in blocks:
        chunk.append(block)
        size += len(block.text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _synchronise(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
