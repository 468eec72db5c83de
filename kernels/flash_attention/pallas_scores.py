"""What the forward and the backward TPU kernels share: a block of scores, who sees whom in it, what dropout keeps.

Scores are held transposed, [keys, queries]: the statistics of a query are then one number in each lane, reductions over
keys are element-wise over registers, and no product needs a transposed left side.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.flash_attention import dropout
from kernels.flash_attention.pallas_tables import kv_block, q_block
from kernels.flash_attention.problem import Operands, Settings
from kernels.tpu import LANES

# What a score is where a query does not see a key, and below which a row's maximum never falls: the difference's
# exponential is zero, also in rows that see nothing.
UNSEEN, FLOOR = -2e30, -1e30
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Strip:
    """A range of a block's queries or keys."""

    start: int
    size: int

    @property
    def slice(self) -> slice:
        """The range as an index."""
        return slice(self.start, self.start + self.size)


class Part(NamedTuple):
    """Some queries of a block with some of its keys."""

    queries: Strip
    keys: Strip


@dataclass(frozen=True)
class Block:
    """The static facts of a kernel."""

    q: int
    kv: int
    chunk: int
    """Queries of a part."""
    kv_len: int
    """Keys that there are, without padding."""
    on_diagonal: bool
    """Whether causal attention masks by position in squares on the diagonal and nowhere else."""
    settings: Settings
    compute: Any
    """The type that products take."""
    precision: lax.Precision
    rows_of: tuple[str, ...]
    """What the scalars hold for each row of the batch, of "q_offset" and "kv_lengths"."""

    def parts(self, diagonal: bool) -> list["Part"]:
        """Parts of the block that are computed one after the other; on the diagonal, without the keys none sees."""
        starts = range(0, self.q, self.chunk)
        keys = [start + self.chunk if diagonal else self.kv for start in starts]
        return [Part(Strip(start, self.chunk), Strip(0, size)) for start, size in zip(starts, keys, strict=True)]

    @property
    def multiplier(self) -> float:
        """What q is multiplied with before its product with k: the scores' exponentials are powers of two."""
        return self.settings.scale * (LOG2_E if self.settings.softcap is None else 1 / self.settings.softcap)

    def dot(self, a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
        """A product in the type of the compute units, accumulated in f32."""
        a, b = a.astype(self.compute), b.astype(self.compute)
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(a, b, dimensions, precision=self.precision, preferred_element_type=jnp.float32)


Position = Callable[..., tuple[Any, Any, Any, Any]]


def spec(shape: tuple[int | None, ...], position: Position, index: Callable[..., tuple]) -> pl.BlockSpec:
    """A block whose index depends on (row of the batch, head, block of queries, block of keys) of a grid step."""
    return pl.BlockSpec(shape, lambda *ids: index(*position(*ids)))


def scalars(operands: Operands, batch: int) -> tuple[jax.Array, tuple[str, ...]]:
    """int32 numbers for scalar memory, `batch` of each of the names that come with them."""
    present = {name: getattr(operands, name) for name in ("q_offset", "kv_lengths")}
    present = {name: value.astype(jnp.int32) for name, value in present.items() if value is not None}
    numbers = jnp.concatenate(list(present.values())) if present else jnp.zeros(1, jnp.int32)
    return numbers, tuple(present)


def element_inputs(
    operands: Operands, settings: Settings, shape: tuple[int, int, int, int], sizes: tuple[int, int], position: Position
) -> dict[str, tuple[jax.Array, pl.BlockSpec]]:
    """The arrays that decide over single elements, padded to whole blocks, with their blocks."""
    batch, heads, q_len, kv_len = shape
    q_size, kv_size = sizes
    q_pad, kv_pad = -q_len % q_size, -kv_len % kv_size
    inputs = {}
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        q_row, kv_row = (
            jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, pad)))[:, None]
            for ids, pad in ((operands.q_segment_ids, q_pad), (operands.kv_segment_ids, kv_pad))
        )
        inputs["q_segments"] = q_row, spec((None, 1, q_size), position, lambda b, h, i, j: (b, 0, i))
        inputs["kv_segments"] = kv_row, spec((None, 1, kv_size), position, lambda b, h, i, j: (b, 0, j))
    mask = _element_mask(operands, settings, q_len, kv_len, sizes)
    if mask is not None:
        full = jnp.broadcast_to(mask, (*mask.shape[:2], q_len, kv_len)).astype(jnp.int8)
        full = jnp.pad(full, ((0, 0), (0, 0), (0, q_pad), (0, kv_pad))).swapaxes(2, 3)
        per_row, per_head = mask.shape[0] > 1, mask.shape[1] > 1
        index = lambda b, h, i, j: (b if per_row else 0, h if per_head else 0, j, i)  # noqa: E731
        inputs["mask"] = full, spec((None, None, kv_size, q_size), position, index)
    if operands.dropout_key is not None:
        first_row, first_head = operands.dropout_offset
        offset = jnp.zeros(batch, jnp.int32) if operands.q_offset is None else operands.q_offset
        words = dropout.row_words(
            operands.dropout_key,
            (first_row + jnp.arange(batch, dtype=jnp.int32))[:, None, None],
            (first_head + jnp.arange(heads, dtype=jnp.int32))[:, None],
            offset[:, None, None] + jnp.arange(q_len + q_pad, dtype=jnp.int32),
        )
        index = lambda b, h, i, j: (b, h, 0, i)  # noqa: E731
        inputs["row_words"] = jnp.stack(words, axis=2), spec((None, None, 2, q_size), position, index)
        column = dropout.column_word(jnp.arange(kv_len + kv_pad, dtype=jnp.int32))
        # In every lane: one for a sublane would have to be spread in each step.
        spread = jnp.broadcast_to(column[:, None], (*column.shape, LANES))
        inputs["column_words"] = spread, spec((kv_size, LANES), position, lambda b, h, i, j: (j, 0))
    return inputs


def _element_mask(operands, settings, q_len, kv_len, sizes):
    """The boolean mask, with a block mask in it whose blocks are not made of whole blocks of the kernel."""
    mask, size = operands.mask, settings.block_size
    blocks = settings.block_mask if operands.block_mask is None else operands.block_mask
    if blocks is not None and (size % sizes[0] or size % sizes[1]):
        q_block, kv_block = jnp.arange(q_len) // size, jnp.arange(kv_len) // size
        expanded = jnp.asarray(blocks)[q_block[:, None], kv_block][None, None]
        mask = expanded if mask is None else mask & expanded
    return mask


def scores(block: Block, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scores times log2(e) [keys, queries] of scaled queries, and tanh's result with a soft-cap."""
    products = block.dot(k, q, (1, 1))
    if block.settings.softcap is None:
        return products, None
    capped = jnp.tanh(products)
    return capped * (block.settings.softcap * LOG2_E), capped


def unseen(
    block: Block, values: jax.Array, refs: dict[str, Any], scalars: dict[str, Any], part: Part, diagonal: bool
) -> jax.Array:
    """The scores of a part of a block with `UNSEEN` where a query does not see a key."""
    if diagonal and part.keys.size > part.queries.size:
        # Only the last square of a strip that ends on the diagonal is cut by it.
        square = part.keys.size - part.queries.size
        above = Part(part.queries, Strip(part.keys.start, square))
        below = Part(part.queries, Strip(part.keys.start + square, part.queries.size))
        above = _unseen(block, values[:square], refs, scalars, above, False)
        return jnp.concatenate([above, _unseen(block, values[square:], refs, scalars, below, True)])
    return _unseen(block, values, refs, scalars, part, diagonal or not block.on_diagonal)


def _unseen(block, values, refs, scalars, part, causal):
    settings = block.settings
    key = lax.broadcasted_iota(jnp.int32, values.shape, 0)
    kv_start = scalars["kv_start"] + part.keys.start
    # The position of the part's first query, counted from its first key.
    ahead = scalars["q_start"] + part.queries.start + scalars.get("q_offset", 0) - kv_start
    causal = causal and settings.causal
    conditions = []
    if causal or settings.window is not None:
        behind = lax.broadcasted_iota(jnp.int32, values.shape, 1) - key
        if causal:
            conditions.append(behind >= -ahead)
        if settings.window is not None:
            conditions.append(behind < settings.window - ahead)
    if "kv_lengths" in scalars:
        conditions.append(key < jnp.minimum(scalars["kv_lengths"], block.kv_len) - kv_start)
    elif block.kv_len % block.kv and not block.on_diagonal:
        conditions.append(key < block.kv_len - kv_start)
    if "q_segments" in refs:
        kv_segments = jnp.broadcast_to(refs["kv_segments"][:, part.keys.slice], (LANES, part.keys.size)).T
        conditions.append(refs["q_segments"][:, part.queries.slice] == across(kv_segments, part.queries.size))
    if "mask" in refs:
        conditions.append(refs["mask"][part.keys.slice, part.queries.slice].astype(jnp.int32) != 0)
    return jnp.where(functools.reduce(jnp.logical_and, conditions), values, UNSEEN) if conditions else values


def step_scalars(block: Block, numbers: Any, batch: Any, word: Any) -> dict[str, Any]:
    """What a step's masks count with: the first query and key of its block, and the row's numbers."""
    batches = numbers.shape[0] // max(1, len(block.rows_of))
    rows = {name: numbers[index * batches + batch] for index, name in enumerate(block.rows_of)}
    return {"q_start": q_block(word) * block.q, "kv_start": kv_block(word) * block.kv, **rows}


def kept(block: Block, refs: dict[str, Any], part: Part) -> jax.Array:
    """True where dropout keeps an element of [keys, queries]."""
    row, second = (refs["row_words"][index : index + 1, part.queries.slice] for index in (0, 1))
    column = across(refs["column_words"][part.keys.slice, :], part.queries.size)
    return dropout.combine(block.settings.dropout_rate, row, second, column)


def across(x: jax.Array, width: int) -> jax.Array:
    """What every lane of [rows, LANES] holds, in `width` lanes: the same registers again."""
    return jnp.concatenate([x] * (width // LANES), axis=1)
