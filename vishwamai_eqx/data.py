"""From documents to batches: tokenized once, packed once, and then any batch by its number.

The stream is one array of ids, `[BOS]` pieces `[EOS]` a document. Rows are stretches of it (`packing`), batch n is a
function of the seed and n alone, and a process reads only the rows that it asks for.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Int64, Integer, UInt32

from vishwamai_eqx import packing
from vishwamai_eqx.cache import cache_folder
from vishwamai_eqx.corpus import Corpus as Corpus
from vishwamai_eqx.corpus import load_documents as load_documents
from vishwamai_eqx.token_cache import tokenize
from vishwamai_eqx.tokenizer import VishwamAITokenizer


class Batch(NamedTuple):
    """Rows of packed documents; where `segment_ids` is 0 there is nothing, and nothing to predict.

    On a device it may have a leading axis of microbatches.
    """

    tokens: Int32[Array | np.ndarray, "*microbatches batch seq"]
    targets: Int32[Array | np.ndarray, "*microbatches batch seq"]
    """The token after each, within its document."""
    segment_ids: Int32[Array | np.ndarray, "*microbatches batch seq"]
    """1, 2, ... for the documents of a row."""
    positions: Int32[Array | np.ndarray, "*microbatches batch seq"]
    """From 0 in each segment."""


class PairedBatch(NamedTuple):
    """A `Batch`, and the same documents in the teacher's tokens."""

    tokens: Int32[Array | np.ndarray, "*microbatches batch seq"]
    targets: Int32[Array | np.ndarray, "*microbatches batch seq"]
    segment_ids: Int32[Array | np.ndarray, "*microbatches batch seq"]
    positions: Int32[Array | np.ndarray, "*microbatches batch seq"]
    teacher_tokens: Int32[Array | np.ndarray, "*microbatches batch seq"]
    """A segment has no more of them than pieces; 0 in the columns that are left."""
    teacher_segment_ids: Int32[Array | np.ndarray, "*microbatches batch seq"]
    teacher_positions: Int32[Array | np.ndarray, "*microbatches batch seq"]
    places: Int32[Array | np.ndarray, "*microbatches batch seq"]
    """The column of the student's piece that ends where the teacher's token does; -1 where none does."""


class DrawnBatch(NamedTuple):
    """A `Batch`, and what its teacher said of it once (`targets`)."""

    tokens: Int32[Array | np.ndarray, "*microbatches batch seq"]
    targets: Int32[Array | np.ndarray, "*microbatches batch seq"]
    segment_ids: Int32[Array | np.ndarray, "*microbatches batch seq"]
    positions: Int32[Array | np.ndarray, "*microbatches batch seq"]
    likeliest: Int32[Array | np.ndarray, "*microbatches batch seq"]
    """The teacher's likeliest next piece; -1 where none of its tokens ends."""
    entropy: Int32[Array | np.ndarray, "*microbatches batch seq"]
    """The bits of its target's entropy in f32, in nats."""
    drawn: Int32[Array | np.ndarray, "*microbatches batch draws_seq"]
    """Pieces drawn from the target, one draw of the whole row after another."""


@dataclass(frozen=True)
class Dataset:
    """The rows of a run and the batches made of them."""

    kind = Batch

    tokenizer: VishwamAITokenizer
    tokens: Integer[np.ndarray, "stream"]
    train_rows: tuple[packing.Rows, ...]
    """The rows of each source; of all text together if sources have no weights."""
    weights: tuple[float, ...]
    """How much each of `train_rows` gives to a batch, relative to the others."""
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

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of all that a run learns from; the data's is another with another tokenizer, which is therefore first."""
        return {"tokenizer": self.tokenizer.fingerprint, "data": self.fingerprint}

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each field of a batch."""
        return (self.seq_len,) * len(self.kind._fields)

    def batch(self, n: int, rows: slice = slice(None)) -> Batch:
        """Batch n of the run, or those of its rows that a process needs."""
        first = n * self.batch_size
        numbers = range(first, first + self.batch_size)[rows]
        return _stack([np.asarray(self._rows[number]) for number in numbers])

    @property
    def batches_per_epoch(self) -> float:
        """Batches that hold as many rows as there are."""
        return sum(map(len, self.train_rows)) / self.batch_size

    def held_out_batches(self, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out rows (the first `limit` of them), `rows` at a time; the last batch ends in empty rows."""
        total = len(self.held_out_rows) if limit is None else min(limit, len(self.held_out_rows))
        for first in range(0, total, rows):
            present = range(first, min(first + rows, total))
            batch = [_row(self.tokens, self.held_out_rows, number, self.seq_len) for number in present]
            batch += [np.zeros((4, self.seq_len), np.int32)] * (rows - len(batch))
            yield _stack(batch)

    def held_out_text(self) -> Iterator[bytes]:
        """The held-out documents, in their order on disk, as bytes."""
        for start, end in self.held_out_spans.tolist():
            for part in range(start, end, 1 << 20):
                yield self.tokenizer.decode_bytes(self.tokens[part : min(part + (1 << 20), end)])

    def source_bytes(self, batch: Batch) -> int:
        """Bytes of source text that a batch predicts."""
        return int(self.tokenizer.piece_lengths[batch.targets][batch.segment_ids > 0].sum())

    @cached_property
    def _rows(self) -> grain.MapDataset:
        """The training rows without end, each source shuffled anew in each of its epochs."""
        sources = [
            grain.MapDataset.source(_Rows(self.tokens, rows, self.seq_len))
            .shuffle(seed=(self.seed + number) % 2**32)
            .repeat()
            for number, rows in enumerate(self.train_rows)
        ]
        return sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, self.weights)


def prepare(
    corpus: Corpus,
    tokenizer: VishwamAITokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    cache_dir: Path | None = None,
) -> Dataset:
    """Tokenize the corpus, or find that done, and pack it."""
    if seq_len < 1 or batch_size < 1:
        raise ValueError(f"seq_len={seq_len}, batch_size={batch_size}: give at least 1 of each")
    stream = tokenize(corpus, tokenizer, cache_dir or cache_folder())
    held_out, weights = corpus.held_out, corpus.data.weights
    train_rows = []
    for number in range(len(weights) or 1):
        chosen = ~held_out & (corpus.source == number) if weights else ~held_out
        train_rows.append(packing.pack(stream.starts[chosen], stream.ends[chosen], seq_len))
    return Dataset(
        tokenizer=tokenizer,
        tokens=stream.tokens,
        train_rows=tuple(train_rows),
        weights=weights or (1.0,),
        held_out_rows=packing.permute(packing.pack(stream.starts[held_out], stream.ends[held_out], seq_len), seed),
        held_out_spans=np.stack([stream.starts[held_out], stream.ends[held_out]], axis=1),
        held_out_bytes=int(corpus.sizes[held_out].sum()),
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        fingerprint=fingerprint(corpus, tokenizer, seq_len=seq_len, batch_size=batch_size, seed=seed),
    )


def fingerprint(corpus: Corpus, tokenizer: VishwamAITokenizer, *, seq_len: int, batch_size: int, seed: int) -> str:
    """That of the dataset that `prepare` makes of them, before it is made."""
    weights, identity = corpus.data.weights, blake2b(digest_size=8)
    identity.update(
        repr([corpus.fingerprint, tokenizer.fingerprint, seq_len, batch_size, seed, list(weights)]).encode()
    )
    identity.update(np.packbits(corpus.held_out).tobytes())
    identity.update(corpus.source.tobytes() if weights else b"")
    return identity.hexdigest()


def batch_hash(batch: Batch | PairedBatch | DrawnBatch) -> str:
    """Sixteen hexadecimal digits that name a batch's rows, whatever their order, the devices or the processes."""
    return str(BatchHash(hash_lanes(batch) if isinstance(batch.tokens, np.ndarray) else _hash_lanes(batch)))


@dataclass(frozen=True)
class BatchHash:
    """The two halves of a batch's hash, perhaps still on their way from a device; as a string, its digits."""

    lanes: UInt32[Array | np.ndarray, "2"]

    def __str__(self) -> str:
        return "{:08x}{:08x}".format(*np.asarray(self.lanes).tolist())


def hash_lanes(batch: Batch | PairedBatch | DrawnBatch) -> UInt32[Array | np.ndarray, "2"]:
    """The two halves of `batch_hash`: a sum over rows, so it can be computed where they lie."""
    xp = np if isinstance(batch.tokens, np.ndarray) else jnp
    columns = xp.arange(batch.tokens.shape[-1], dtype=np.uint32)
    lanes = []
    for seed in (0x9E3779B9, 0x85EBCA6B):
        cells = columns * np.uint32(seed)
        for field in batch:
            for part in xp.split(field, field.shape[-1] // len(columns), axis=-1):
                cells = _mix(cells ^ part.astype(np.uint32))
        rows = _mix(cells.sum(axis=-1, dtype=np.uint32))
        lanes.append(rows.sum(dtype=np.uint32))
    return xp.stack(lanes)


def _mix(values):
    """A bijection of 32 bits in which every bit moves every other."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x7FEB352D)
    values = (values ^ (values >> np.uint32(15))) * np.uint32(0x846CA68B)
    return values ^ (values >> np.uint32(16))


_hash_lanes = jax.jit(hash_lanes)


def gzip_bits_per_byte(text: Iterable[bytes]) -> float:
    """What `gzip -9` needs for a byte of a text: the figure for a model to beat."""
    compressor = zlib.compressobj(9, wbits=31)
    read, written = 0, 0
    for piece in text:
        read += len(piece)
        written += len(compressor.compress(piece))
    return 8 * (written + len(compressor.flush())) / read


class _Rows:
    """The training rows, as grain reads them: by number."""

    def __init__(self, tokens: Integer[np.ndarray, "stream"], rows: packing.Rows, seq_len: int):
        self.tokens, self.rows, self.seq_len = tokens, rows, seq_len

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Int32[np.ndarray, "4 seq"]:
        return _row(self.tokens, self.rows, index, self.seq_len)


def _row(
    tokens: Integer[np.ndarray, "stream"], rows: packing.Rows, number: int, seq_len: int
) -> Int32[np.ndarray, "4 seq"]:
    """The four fields of one row, in the order of `Batch`."""
    row = np.zeros((4, seq_len), np.int32)
    at = 0
    for segment, stretch in enumerate(range(int(rows.first[number]), int(rows.first[number + 1])), 1):
        start, length = int(rows.start[stretch]), int(rows.length[stretch])
        here = slice(at, at + length)
        row[0, here] = tokens[start : start + length]
        row[1, here] = tokens[start + 1 : start + length + 1]
        row[2, here] = segment
        row[3, here] = np.arange(length)
        at += length
    return row


def _stack(rows: list[Int32[np.ndarray, "4 seq"]]) -> Batch:
    return Batch(*np.stack(rows, axis=1))
