"""Rows that hold a text in the student's pieces and, in the same columns, in its teacher's tokens.

Each segment is tokenized for the teacher by itself, `<bos>` before it: where a document is cut between two rows, it is
between two pieces, and the teacher reads what the student reads. The two are aligned by the bytes that they have read.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int, Int32

from vishwamai_eqx.data import Batch, Dataset, PairedBatch
from vishwamai_eqx.huggingface_tokenizer import Piece
from vishwamai_eqx.tokenizer import VishwamAITokenizer


@dataclass(frozen=True)
class Pairs:
    """The batches of a dataset for a student and its teacher; batch n is as good a function of the seed and n."""

    student: Dataset
    teacher: VishwamAITokenizer
    teacher_fingerprint: str
    """Of the teacher's weights."""
    kind = PairedBatch

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of all that a run learns from."""
        return {**self.student.fingerprints, "teacher": self.teacher_fingerprint}

    @property
    def batch_size(self) -> int:
        return self.student.batch_size

    @property
    def seq_len(self) -> int:
        return self.student.seq_len

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each field of a batch."""
        return (self.seq_len,) * len(self.kind._fields)

    def batch(self, n: int, rows: slice = slice(None)) -> PairedBatch:
        """Batch n of the run, or those of its rows that a process needs."""
        return self.pair(self.student.batch(n, rows))

    def pair(self, batch: Batch) -> PairedBatch:
        """A batch with what the teacher reads."""
        opened = np.flatnonzero((batch.segment_ids > 0) & (batch.positions == 0))
        lengths = _lengths(batch.segment_ids, opened)
        tokens, segments = batch.tokens.ravel(), batch.segment_ids.ravel()
        stretches = [tokens[start : start + length] for start, length in zip(opened, lengths, strict=True)]
        read = self._read([self.student.tokenizer.decode_bytes(pieces) for pieces in stretches])
        fields = np.zeros((4, *batch.tokens.shape), np.int32)
        flat = fields.reshape(4, -1)
        flat[3] = -1
        for start, pieces, ids in zip(opened.tolist(), stretches, read, strict=True):
            # Of a document that goes on from another row `<bos>` is one token too many.
            ids = ids[: len(pieces)]
            here = slice(start, start + len(ids))
            place = aligned(self.student.tokenizer.piece_lengths[pieces], self.teacher.piece_lengths[ids])
            flat[0, here], flat[1, here], flat[2, here] = ids, segments[start], np.arange(len(ids))
            flat[3, here] = np.where(place < 0, -1, place + start % self.seq_len)
        return PairedBatch(*batch, *fields)

    def _read(self, texts: list[bytes]) -> list[Int32[np.ndarray, "_"]]:
        """`<bos>` and the teacher's tokens of each text.

        It may begin and end inside a character, and one that a student wrote may have any bytes in it: what is part of
        no character is read byte by byte.
        """
        cut = [_characters(text) for text in texts]
        encoded = iter(self.teacher.encode_batch([part for parts in cut for part in parts if isinstance(part, str)]))
        return [
            np.concatenate(
                [
                    [self.teacher.bos_id],
                    *(next(encoded) if isinstance(part, str) else self._bytes[list(part)] for part in parts),
                ]
            ).astype(np.int32)
            for parts in cut
        ]

    @cached_property
    def _bytes(self) -> Int32[np.ndarray, "256"]:
        """The teacher's token of each byte."""
        found = np.zeros(256, np.int32)
        for id, piece in enumerate(self.teacher.proto.pieces):
            if piece.type == Piece.BYTE:
                found[int(piece.piece[3:5], 16)] = id
        return found


def aligned(student: Int[np.ndarray, "pieces"], teacher: Int[np.ndarray, "tokens"]) -> Int[np.ndarray, "tokens"]:
    """The student's piece that ends at the byte where each of the teacher's tokens ends, or -1.

    Both are the bytes of each piece of one text; `<bos>` has none, and ends where the text begins.
    """
    mine, theirs = np.cumsum(student), np.cumsum(teacher)
    found = np.searchsorted(mine, theirs)
    return np.where(mine[np.minimum(found, len(mine) - 1)] == theirs, found, -1)


def _characters(text: bytes) -> list[str | bytes]:
    """The text in stretches of whole characters and, between them, of bytes that are of none."""
    parts: list[str | bytes] = []
    while text:
        try:
            parts.append(text.decode())
            break
        except UnicodeDecodeError as error:
            parts += [text[: error.start].decode()] if error.start else []
            parts.append(text[error.start : error.end])
            text = text[error.end :]
    return parts


def _lengths(
    segment_ids: Int[np.ndarray, "batch seq"], opened: Int[np.ndarray, "segments"]
) -> Int[np.ndarray, "segments"]:
    """How long the segments are that begin there."""
    closed = np.append(opened[1:], segment_ids.size)
    real = np.append(0, np.cumsum(segment_ids.ravel() > 0))
    return real[closed] - real[opened]
