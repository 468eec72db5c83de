"""Which blocks of the score matrix the TPU kernels visit, in which order, as a table of scalars read ahead.

A grid step is one block that some query may see some key of. The table says which, so that what no query sees costs
neither a step nor a copy; with masks that are known when tracing its length is a constant, else the grid is as long as
the largest row of the batch needs. One word a step: block of queries, block of keys, and what to do there.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.flash_attention.problem import Operands, Settings
from kernels.flash_attention.scores import block_mask_of

FIRST, LAST, FULL, MASKED, DIAGONAL = 1, 2, 4, 8, 16
"""The first and the last step of a block of queries; of what is computed at most one: everything is seen, elements are
masked, or elements are masked and the block is a square on the diagonal of causal attention."""
_FLAG_BITS, _KV_BITS, _Q_BITS = 5, 14, 12


class Schedule(NamedTuple):
    """The steps of each row of the batch."""

    words: jax.Array
    """int32 [rows of the table * length]; one row serves the whole batch where nothing depends on it."""
    steps: int | jax.Array
    rows: int
    kinds: tuple[int, ...]
    """Which of FULL, MASKED and DIAGONAL there may be: a kernel has no code for the others."""

    def word(self, ref: Any, batch: Any, step: Any) -> Any:
        """The step's word, from the table's reference in scalar memory."""
        return ref[step if self.rows == 1 else batch * (self.words.size // self.rows) + step]


def q_block(word: Any) -> Any:
    """The block of queries of a step."""
    return word >> (_FLAG_BITS + _KV_BITS)


def kv_block(word: Any) -> Any:
    """The block of keys of a step."""
    return (word >> _FLAG_BITS) & (2**_KV_BITS - 1)


def schedule(
    lengths: tuple[int, int], sizes: tuple[int, int], operands: Operands, settings: Settings, kv_range: tuple[int, int]
) -> Schedule:
    """The blocks to visit, block of queries after block of queries; one that sees nothing has one step, to write zeros.

    `lengths` and `sizes` are of (queries, keys); only blocks of keys in `kv_range` are visited.

    **Raises** ValueError for more blocks than a word can name.
    """
    (q_len, kv_len), (q_size, kv_size) = lengths, sizes
    seen, full = _visible_blocks(q_len, kv_len, q_size, kv_size, operands, settings)
    xp = np if isinstance(seen, np.ndarray) and isinstance(full, np.ndarray) else jnp
    rows, q_blocks, kv_blocks = np.broadcast_shapes(seen.shape, full.shape)
    if kv_blocks >= 2**_KV_BITS or q_blocks >= 2**_Q_BITS:
        raise ValueError(
            f"flash_attention: q_len={q_len} and kv_len={kv_len} make {q_blocks} x {kv_blocks} blocks of {q_size} x "
            f"{kv_size}, at most 4095 x 16383 are possible; use larger block sizes"
        )
    first, last = kv_range[0] // kv_size, -(-kv_range[1] // kv_size)
    seen, full = (xp.broadcast_to(x, (rows, q_blocks, kv_blocks))[:, :, first:last] for x in (seen, full))
    columns = np.arange(first, last)
    visited = seen | (~seen.any(axis=2, keepdims=True) & (columns == first))
    before = xp.cumsum(visited, axis=2)
    words = (np.arange(q_blocks)[:, None] << (_FLAG_BITS + _KV_BITS)) | (columns << _FLAG_BITS)
    words = words | FIRST * (before == 1) | LAST * (before == before[:, :, -1:])
    diagonal = np.zeros((q_blocks, len(columns)), bool)
    if on_diagonal(lengths, sizes, operands, settings):
        diagonal = np.arange(q_blocks)[:, None] == columns
    flags = {FULL: seen & full, MASKED: seen & ~full & ~diagonal}
    if diagonal.any():
        flags[DIAGONAL] = seen & ~full & diagonal
    words = words | sum(flag * where for flag, where in flags.items())
    words, visited = words.reshape(rows, -1), visited.reshape(rows, -1)
    counts = visited.sum(axis=1)
    order = xp.argsort(~visited, axis=1, stable=True)
    words = xp.take_along_axis(words, order, axis=1)
    length = q_blocks * len(columns)
    steps = counts.max()
    if xp is np:
        length = steps = int(counts.max())
    # A row that is done stays at its last blocks, with nothing to do there.
    final = xp.take_along_axis(words, counts[:, None] - 1, axis=1)
    idle = final & ~(2**_FLAG_BITS - 1)
    words = xp.where(np.arange(length) < counts[:, None], words[:, :length], idle)
    # What is traced can hide a block or a part of it, and show none that positions hide.
    known_seen, known_full = _known_blocks(q_len, kv_len, q_size, kv_size, operands, settings)
    known_seen, known_full = (x[0, :, first:last] for x in (known_seen, known_full))
    possible = {FULL: known_seen & known_full, MASKED: known_seen & ~diagonal, DIAGONAL: known_seen & diagonal}
    kinds = tuple(
        flag for flag, where in flags.items() if (where if isinstance(where, np.ndarray) else possible[flag]).any()
    )
    return Schedule(jnp.asarray(words, jnp.int32).reshape(-1), steps, rows, kinds)


def on_diagonal(lengths: tuple[int, int], sizes: tuple[int, int], operands: Operands, settings: Settings) -> bool:
    """Whether causal attention masks by position in squares on the diagonal and nowhere else."""
    return settings.causal and operands.q_offset is None and sizes[0] == sizes[1] and lengths[0] <= lengths[1]


def _visible_blocks(q_len, kv_len, q_size, kv_size, operands, settings):
    """For each row of the batch (one, if all are alike) and block: is anything visible, and is everything?"""
    first_q, first_k = np.arange(0, q_len, q_size)[:, None], np.arange(0, kv_len, kv_size)
    last_q, last_k = np.minimum(first_q + q_size, q_len) - 1, np.minimum(first_k + kv_size, kv_len) - 1
    # Keys that pad the last block are no keys.
    full = np.broadcast_to(first_k + kv_size <= kv_len, (1, len(first_q), len(first_k)))
    seen = np.ones_like(full)
    offset = 0 if operands.q_offset is None else operands.q_offset[:, None, None]
    if settings.causal:
        seen, full = seen & (last_q + offset >= first_k), full & (first_q + offset >= last_k)
    if settings.window is not None:
        seen = seen & (first_q + offset - last_k < settings.window)
        full = full & (last_q + offset - first_k < settings.window)
    if operands.kv_lengths is not None:
        lengths = operands.kv_lengths[:, None, None]
        seen, full = seen & (first_k < lengths), full & (last_k < lengths)
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        q_low, q_high = (x[:, :, None] for x in _extremes(operands.q_segment_ids, q_size))
        k_low, k_high = (x[:, None, :] for x in _extremes(operands.kv_segment_ids, kv_size))
        seen = seen & (q_low <= k_high) & (k_low <= q_high)
        full = full & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    if operands.mask is not None:
        full = full & False
    block_mask = block_mask_of(operands, settings)
    if block_mask is not None:
        # Blocks of the mask need not be these blocks: count by differences of a table of sums.
        xp = np if isinstance(block_mask, np.ndarray) else jnp
        sums = xp.pad(xp.cumsum(xp.cumsum(block_mask, axis=0), axis=1), ((1, 0), (1, 0)))
        size = settings.block_size
        top, bottom, left, right = first_q // size, last_q // size + 1, first_k // size, last_k // size + 1
        count = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        seen, full = seen & (count > 0), full & (count == (bottom - top) * (right - left))
    return seen, full


def _known_blocks(q_len, kv_len, q_size, kv_size, operands, settings):
    """`_visible_blocks` as far as it is known when tracing: at least what is visible."""
    if operands.q_offset is not None:
        settings = dataclasses.replace(settings, causal=False, window=None)
    traced = dict.fromkeys(("q_segment_ids", "kv_segment_ids", "mask", "block_mask", "q_offset", "kv_lengths"))
    return _visible_blocks(q_len, kv_len, q_size, kv_size, operands._replace(**traced), settings)


def _extremes(segment_ids, size):
    """The least and the largest segment of each block."""
    padded = jnp.pad(segment_ids, ((0, 0), (0, -segment_ids.shape[1] % size)), mode="edge")
    blocks = padded.reshape(padded.shape[0], -1, size)
    return blocks.min(axis=2), blocks.max(axis=2)
