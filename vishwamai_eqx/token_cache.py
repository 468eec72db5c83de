"""The corpus as one memory-mapped array of ids, made once for a text and a vocabulary."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer

from vishwamai_eqx.cache import MegabyteBar, locked
from vishwamai_eqx.corpus import Block, Corpus
from vishwamai_eqx.tokenizer import VishwamAITokenizer

# Text that is encoded, written and synchronised at a time: what a kill can cost.
CHUNK_BYTES = 8 << 20
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
        documents, end = _whole(tokens_path, ends_path, dtype)
        if documents < len(corpus.sizes):
            _append(corpus, tokenizer, tokens_path, ends_path, dtype, documents, end)
    ends = np.fromfile(ends_path, np.int64)
    tokens = np.memmap(tokens_path, dtype, "r", shape=(int(ends[-1]),))
    return TokenStream(tokens, np.concatenate([[0], ends[:-1]]), ends)


def _whole(tokens_path: Path, ends_path: Path, dtype: np.dtype) -> tuple[int, int]:
    """Documents that are whole on disk, and their tokens; what lies behind them is cut off."""
    tokens_path.touch()
    ends_path.touch()
    ends = np.fromfile(ends_path, np.int64)
    # Tokens are on disk before the ends that speak of them, unless someone touched the files.
    ends = ends[ends <= tokens_path.stat().st_size // dtype.itemsize]
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
    """Encode from a document on; `end` tokens are there."""
    opening = True

    def write(blocks: list[Block]) -> None:
        nonlocal end, opening
        ends = []
        for block, ids in zip(blocks, tokenizer.encode_batch([block.text for block in blocks]), strict=True):
            written = np.concatenate([[tokenizer.bos_id] * opening, ids, [tokenizer.eos_id] * block.last])
            tokens_file.write(written.astype(dtype).tobytes())
            end += len(written)
            opening = block.last
            if block.last:
                ends.append(end)
        for file, content in ((tokens_file, b""), (ends_file, np.array(ends, np.int64).tobytes())):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    with (
        tokens_path.open("ab") as tokens_file,
        ends_path.open("ab") as ends_file,
        MegabyteBar("tokenizing", int(corpus.sizes.sum())) as bar,
    ):
        bar.advance(int(corpus.sizes[:document].sum()))
        blocks, size = [], 0
        for block in corpus.blocks(document):
            blocks.append(block)
            size += len(block.text.encode())
            if size >= CHUNK_BYTES:
                write(blocks)
                bar.advance(size)
                blocks, size = [], 0
        write(blocks)
