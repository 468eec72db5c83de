"""What the forward and the backward TPU kernels share: a block of scores, who sees whom in it, what dropout keeps.

Scores are held transposed, [keys, queries]: the statistics of a query are then one number in each lane, reductions over
keys are element-wise over registers, and no product needs a transposed left side.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.flash_attention import dropout
from kernels.flash_attention.pallas_blocks import LANES
from kernels.flash_attention.problem import Operands, Settings

# What a score is where a query does not see a key, and below which a row's maximum never falls: the difference's
# exponential is zero, also in rows that see nothing.
UNSEEN, FLOOR = -2e30, -1e30
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Block:
    """The static facts of a kernel."""

    q: int
    kv: int
    kv_len: int
    """Keys that there are, without padding."""
    settings: Settings
    compute: Any
    """The type that products take."""
    precision: lax.Precision
    rows_of: tuple[str, ...]
    """What the scalars hold for each row of the batch, of "q_offset" and "kv_lengths"."""

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
        for name, ids, pad, size in (
            ("q_segments", operands.q_segment_ids, q_pad, q_size),
            ("kv_segments", operands.kv_segment_ids, kv_pad, kv_size),
        ):
            row = jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, pad)))[:, None]
            of_queries = name == "q_segments"
            index = functools.partial(lambda b, h, i, j, of_queries: (b, 0, i if of_queries else j), of_queries=of_queries)
            inputs[name] = row, spec((None, 1, size), position, index)
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
    block: Block, values: jax.Array, refs: dict[str, Any], numbers: Any, batch: Any, q_start: Any, kv_start: Any, low: int
) -> jax.Array:
    """The scores with `UNSEEN` where a query does not see a key; `low` is where in the block its first key is."""
    settings, keys = block.settings, values.shape[0]
    rows = {name: numbers[_row(numbers, block, index, batch)] for index, name in enumerate(block.rows_of)}
    key = lax.broadcasted_iota(jnp.int32, values.shape, 0)
    # The position of the block's first query, counted from its first key.
    ahead = q_start + rows.get("q_offset", 0) - kv_start
    conditions = []
    if settings.causal or settings.window is not None:
        behind = lax.broadcasted_iota(jnp.int32, values.shape, 1) - key
        if settings.causal:
            conditions.append(behind >= -ahead)
        if settings.window is not None:
            conditions.append(behind < settings.window - ahead)
    if "kv_lengths" in rows:
        conditions.append(key < jnp.minimum(rows["kv_lengths"], block.kv_len) - kv_start)
    elif block.kv_len % block.kv:
        conditions.append(key < block.kv_len - kv_start)
    if "q_segments" in refs:
        kv_segments = jnp.broadcast_to(refs["kv_segments"][:, low : low + keys], (LANES, keys)).T
        conditions.append(refs["q_segments"][...] == across(kv_segments, values.shape[1]))
    if "mask" in refs:
        conditions.append(refs["mask"][low : low + keys, :].astype(jnp.int32) != 0)
    return jnp.where(functools.reduce(jnp.logical_and, conditions), values, UNSEEN) if conditions else values


def kept(block: Block, refs: dict[str, Any], kv_start: Any, shape: tuple[int, int]) -> jax.Array:
    """True where dropout keeps an element of [keys, queries]."""
    key = kv_start + lax.broadcasted_iota(jnp.int32, (shape[0], LANES), 0)
    row, second = refs["row_words"][0:1, :], refs["row_words"][1:2, :]
    column = across(dropout.column_word(key), shape[1])
    return dropout.combine(block.settings.dropout_rate, row, second, column)


def across(x: jax.Array, width: int) -> jax.Array:
    """What every lane of [rows, LANES] holds, in `width` lanes: the same registers again."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


def _row(numbers, block, index, batch):
    return index * (numbers.shape[0] // len(block.rows_of)) + batch
