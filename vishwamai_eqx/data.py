"""From documents to batches: tokenized once, packed once, and then any batch by its number.

The stream is one array of ids, `[BOS]` pieces `[EOS]` a document. Rows are stretches of it (`packing`), batch n is a
function of the seed and n alone, and a process reads only the rows that it asks for.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Array, Int32, Int64, Integer

from vishwamai_eqx import packing
from vishwamai_eqx.documents import Corpus
from vishwamai_eqx.documents import load_documents as load_documents
from vishwamai_eqx.token_cache import tokenize
from vishwamai_eqx.tokenizer import VishwamAITokenizer

# A vocabulary does not get better with more text than this.
TOKENIZER_BYTES = 32 << 20


class Batch(NamedTuple):
    """Rows of packed documents; where `segment_ids` is 0 there is nothing, and nothing to predict."""

    tokens: Int32[Array | np.ndarray, "batch seq"]
    targets: Int32[Array | np.ndarray, "batch seq"]
    """The token after each, within its document."""
    segment_ids: Int32[Array | np.ndarray, "batch seq"]
    """1, 2, ... for the documents of a row."""
    positions: Int32[Array | np.ndarray, "batch seq"]
    """From 0 in each segment."""


@dataclass(frozen=True)
class Dataset:
    """The rows of a run and the batches made of them."""

    tokenizer: VishwamAITokenizer
    tokens: Integer[np.ndarray, "stream"]
    train_rows: packing.Rows
    held_out_rows: packing.Rows
    held_out_spans: Int64[np.ndarray, "documents 2"]
    """Where each held-out document begins and ends in the stream."""
    held_out_bytes: int
    """Bytes of source text that the held-out rows predict."""
    seq_len: int
    batch_size: int
    seed: int
    fingerprint: str
    """Sixteen hexadecimal digits: two runs with the same ones see the same batches."""

    @cached_property
    def _shuffled(self) -> grain.MapDataset:
        return (
            grain.MapDataset.source(_RowSource(self.tokens, self.train_rows, self.seq_len))
            .shuffle(seed=self.seed % 2**32)
            .repeat()
        )

    def batch(self, n: int, rows: slice = slice(None)) -> Batch:
        """Batch n of the run, or those of its rows that a process needs."""
        first = n * self.batch_size
        numbers = range(first, first + self.batch_size)[rows]
        return _stack([self._shuffled[number] for number in numbers])

    @property
    def batches_per_epoch(self) -> float:
        """Batches until every training row was seen once."""
        return len(self.train_rows) / self.batch_size

    def held_out_batches(self, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out rows (the first `limit` of them), `rows` at a time; the last batch ends in empty rows."""
        total = len(self.held_out_rows) if limit is None else min(limit, len(self.held_out_rows))
        for first in range(0, total, rows):
            present = range(first, min(first + rows, total))
            batch = [_row(self.tokens, self.held_out_rows, number, self.seq_len) for number in present]
            yield _stack(batch + [np.zeros((4, self.seq_len), np.int32)] * (rows - len(batch)))

    def held_out_text(self) -> Iterator[bytes]:
        """The held-out documents, in their order on disk, as bytes."""
        for start, end in self.held_out_spans.tolist():
            yield self.tokenizer.decode_bytes(self.tokens[start:end])

    def source_bytes(self, batch: Batch) -> int:
        """Bytes of source text that a batch predicts."""
        return int(self.tokenizer.piece_lengths[batch.targets][batch.segment_ids > 0].sum())


def train_tokenizer(corpus: Corpus, vocab_size: int, directory: Path) -> VishwamAITokenizer:
    """A tokenizer trained on the documents that are not held out, a sample of them where they are many."""
    chosen = np.flatnonzero(~corpus.held_out)
    # In the order of their hashes, which have nothing to do with what they say.
    chosen = chosen[np.argsort(corpus.digests[chosen], kind="stable")]
    enough = np.searchsorted(np.cumsum(corpus.sizes[chosen]), TOKENIZER_BYTES) + 1
    texts = (text for document in chosen[:enough].tolist() for text in corpus.text(document))
    return VishwamAITokenizer.train(texts, vocab_size, directory)


def prepare(
    corpus: Corpus, tokenizer: VishwamAITokenizer, *, seq_len: int, batch_size: int, seed: int, cache_dir: Path
) -> Dataset:
    """Tokenize and pack the corpus, or find that done in `cache_dir`."""
    stream = tokenize(corpus, tokenizer, cache_dir)
    train, held_out = ~corpus.held_out, corpus.held_out
    return Dataset(
        tokenizer=tokenizer,
        tokens=stream.tokens,
        train_rows=packing.pack(stream.starts[train], stream.ends[train], seq_len),
        held_out_rows=packing.permute(packing.pack(stream.starts[held_out], stream.ends[held_out], seq_len), seed),
        held_out_spans=np.stack([stream.starts[held_out], stream.ends[held_out]], axis=1),
        held_out_bytes=int(corpus.sizes[held_out].sum()),
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        fingerprint=blake2b(
            f"{corpus.fingerprint} {tokenizer.fingerprint} {seq_len} {batch_size} {seed}".encode()
            + np.packbits(held_out).tobytes(),
            digest_size=8,
        ).hexdigest(),
    )


def batch_hash(batch: Batch, first_row: int = 0) -> str:
    """Sixteen hexadecimal digits that name a batch's rows.

    The sum, modulo 2^64, of a hash of each row with its number in the global batch, so the parts of several processes
    add up.
    """
    fields = [np.ascontiguousarray(field, np.int32) for field in batch]
    total = 0
    for index, row in enumerate(zip(*fields, strict=True), first_row):
        digest = blake2b(index.to_bytes(8, "little"), digest_size=8)
        for field in row:
            digest.update(field.tobytes())
        total += int.from_bytes(digest.digest(), "little")
    return f"{total % 2**64:016x}"


def gzip_bits_per_byte(text: Iterator[bytes]) -> float:
    """What `gzip -9` needs for a byte of a text: the figure for a model to beat."""
    compressor = zlib.compressobj(9, wbits=31)
    read, written = 0, 0
    for piece in text:
        read += len(piece)
        written += len(compressor.compress(piece))
    return 8 * (written + len(compressor.flush())) / read


class _RowSource:
    """The training rows, as grain reads them: by number."""

    def __init__(self, tokens: Integer[np.ndarray, "stream"], rows: packing.Rows, seq_len: int):
        self.tokens, self.rows, self.seq_len = tokens, rows, seq_len

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Int32[np.ndarray, "fields seq"]:
        return _row(self.tokens, self.rows, number, self.seq_len)


def _row(
    tokens: Integer[np.ndarray, "stream"], rows: packing.Rows, number: int, seq_len: int
) -> Int32[np.ndarray, "fields seq"]:
    """The four fields of one row, in the order of `Batch`."""
    row = np.zeros((4, seq_len), np.int32)
    first, last = int(rows.first[number]), int(rows.first[number + 1])
    at = 0
    for segment, stretch in enumerate(range(first, last), 1):
        start, length = int(rows.start[stretch]), int(rows.length[stretch])
        here = slice(at, at + length)
        row[0, here] = tokens[start : start + length]
        row[1, here] = tokens[start + 1 : start + length + 1]
        row[2, here] = segment
        row[3, here] = np.arange(length)
        at += length
    return row


def _stack(rows: list[Int32[np.ndarray, "fields seq"]]) -> Batch:
    return Batch(*np.stack(rows, axis=1))
