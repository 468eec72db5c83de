"""The corpus as one memory-mapped array of ids, made once for a text and a vocabulary."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vishwamai_eqx.documents import Block, Corpus
from vishwamai_eqx.tokenizer import VishwamAITokenizer

# Text that is encoded, written and synchronised at a time: what a kill can cost.
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class TokenStream:
    """`[BOS]` pieces `[EOS]` of every document, one after another."""

    tokens: Integer[np.ndarray, "stream"]
    starts: Int64[np.ndarray, "documents"]
    ends: Int64[np.ndarray, "documents"]


def tokenize(corpus: Corpus, tokenizer: VishwamAITokenizer, cache_dir: Path) -> TokenStream:
    """The corpus's ids, from the cache or into it; one that was cut short goes on where it stopped."""
    specials = f"{tokenizer.bos_id}-{tokenizer.eos_id}"
    directory = cache_dir / "tokens" / f"{corpus.fingerprint}-{tokenizer.fingerprint}-{specials}"
    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    tokens_path, ends_path = directory / f"tokens.{dtype.name}", directory / "ends.int64"
    documents = len(corpus.sizes)
    done, end = _progress(tokens_path, ends_path, dtype)
    if done < documents:
        _append(corpus, tokenizer, tokens_path, ends_path, dtype, done, end)
    ends = np.fromfile(ends_path, np.int64)
    tokens = np.memmap(tokens_path, dtype, "r", shape=(int(ends[-1]),))
    return TokenStream(tokens, np.concatenate([[0], ends[:-1]]), ends)


def _progress(tokens_path: Path, ends_path: Path, dtype: np.dtype) -> tuple[int, int]:
    """Documents that are whole on disk, and their tokens; what lies behind them is cut off."""
    tokens_path.touch()
    ends_path.touch()
    ends = np.fromfile(ends_path, np.int64)
    # Tokens are on disk before the ends that speak of them, unless someone touched the files.
    ends = ends[ends <= tokens_path.stat().st_size // dtype.itemsize]
    end = int(ends[-1]) if len(ends) else 0
    os.truncate(ends_path, ends.nbytes)
    os.truncate(tokens_path, end * dtype.itemsize)
    return len(ends), end


def _append(
    corpus: Corpus,
    tokenizer: VishwamAITokenizer,
    tokens_path: Path,
    ends_path: Path,
    dtype: np.dtype,
    first: int,
    end: int,
) -> None:
    columns = (TextColumn("tokenizing"), BarColumn(), MofNCompleteColumn(), TextColumn("MB"), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        tokens_path.open("ab") as tokens_file,
        ends_path.open("ab") as ends_file,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("", total=int(corpus.sizes.sum()) // 10**6)
        done = int(corpus.sizes[:first].sum())
        waiting: list[Block] = []
        size = 0
        opening = True

        def write() -> None:
            nonlocal end, opening
            ends = []
            for block, ids in zip(waiting, tokenizer.encode_batch([block.text for block in waiting]), strict=True):
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

        for block in corpus.blocks(first):
            waiting.append(block)
            size += len(block.text.encode())
            if size >= CHUNK_BYTES:
                write()
                done += size
                progress.update(task, completed=done // 10**6)
                waiting, size = [], 0
        write()
