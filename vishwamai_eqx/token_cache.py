"""The corpus as one memory-mapped array of ids, made once for a text and a vocabulary."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int32, Int64, Integer

from vishwamai_eqx.cache import MegabyteBar, locked
from vishwamai_eqx.corpus import Block, Corpus
from vishwamai_eqx.manifest import remove
from vishwamai_eqx.tokenizer import VishwamAITokenizer

# Text that is encoded, written and synchronised at a time.
CHUNK_CHARACTERS = 1 << 20
# SentencePiece lets go of the interpreter while it encodes.
WORKERS = os.cpu_count() or 1
# Raised when the stream would come out differently.
FORMAT = 1


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
    tokens_path, ends_path = folder / f"tokens.{dtype.name}", folder / "ends.int64"
    with locked(folder):
        documents, end = _whole(tokens_path, ends_path, dtype, len(corpus.sizes))
        if documents < len(corpus.sizes):
            _append(corpus, tokenizer, tokens_path, ends_path, dtype, documents, end)
    ends = np.fromfile(ends_path, np.int64)
    tokens = np.memmap(tokens_path, dtype, "r", shape=(int(ends[-1]),))
    return TokenStream(tokens, np.concatenate([[0], ends[:-1]]), ends)


def _whole(tokens_path: Path, ends_path: Path, dtype: np.dtype, documents: int) -> tuple[int, int]:
    """Documents that are whole on disk, and their tokens; what lies behind them is cut off."""
    for path in (tokens_path, ends_path):
        if path.is_dir():
            remove(path)
        path.touch()
    ends = np.fromfile(ends_path, np.int64)[:documents]
    starts = np.concatenate([[0], ends[:-1]])
    # Tokens are on disk before the ends that speak of them, and no document has fewer than two, unless the files are
    # damaged.
    right = (ends <= tokens_path.stat().st_size // dtype.itemsize) & (ends >= starts + 2)
    ends = ends[: np.append(right, False).argmin()]
    end = int(ends[-1]) if len(ends) else 0
    if ends_path.stat().st_size != ends.nbytes or tokens_path.stat().st_size != end * dtype.itemsize:
        os.truncate(ends_path, ends.nbytes)
        os.truncate(tokens_path, end * dtype.itemsize)
    return len(ends), end


def _append(
    corpus: Corpus,
    tokenizer: VishwamAITokenizer,
    tokens_path: Path,
    ends_path: Path,
    dtype: np.dtype,
    document: int,
    end: int,
) -> None:
    """Encode from a document on, on all cores; `end` tokens are there."""
    opening = True
    with (
        ThreadPoolExecutor(WORKERS) as pool,
        tokens_path.open("ab") as tokens_file,
        ends_path.open("ab") as ends_file,
        MegabyteBar("tokenizing", int(corpus.sizes.sum())) as bar,
    ):
        bar.advance(int(corpus.sizes[:document].sum()))

        def write(blocks: list[Block], encoded: list[Int32[np.ndarray, "_"]]) -> None:
            nonlocal end, opening
            ends = []
            for block, ids in zip(blocks, encoded, strict=True):
                written = np.concatenate([[tokenizer.bos_id] * opening, ids, [tokenizer.eos_id] * block.last])
                tokens_file.write(written.astype(dtype).tobytes())
                end += len(written)
                opening = block.last
                if block.last:
                    ends.append(end)
            _synchronise(tokens_file)
            ends_file.write(np.array(ends, np.int64).tobytes())
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
