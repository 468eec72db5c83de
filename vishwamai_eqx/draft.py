"""A draft model's vocabulary beside that of the model it drafts for."""

import numpy as np

from vishwamai_eqx.decode import CachedModel, Guide
from vishwamai_eqx.prune import TeacherPieces

# Pieces of a token that a draft model reads; of the few longer ones it reads the first, and drafts worse.
MOST = 8


def same(model: CachedModel, vocab: int) -> Guide:
    """A draft model with the same vocabulary."""
    every = np.arange(vocab, dtype=np.int32)
    return Guide(model, every[:, None], np.ones(vocab, np.int32), every)


def pruned(model: CachedModel, vocab: int, of: TeacherPieces) -> Guide:
    """A student that drafts for its teacher of `vocab` embeddings, whose tokens are the student's pieces in a row."""
    counts = np.zeros(vocab, np.int32)
    counts[: len(of.ends)] = np.minimum(of.ends - of.starts, MOST)
    offset = np.arange(counts.max())
    place = np.pad(of.starts, (0, vocab - len(of.starts)))[:, None] + offset
    pieces = np.where(offset < counts[:, None], of.pieces[np.minimum(place, len(of.pieces) - 1)], 0)
    return Guide(model, pieces.astype(np.int32), counts, of.kept)
