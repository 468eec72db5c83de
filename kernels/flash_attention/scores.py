"""Who sees whom within one block of the score matrix, for the forms that go block by block.

A block's result has axes [batch, kv_heads, group, queries, keys], sizes of 1 where nothing depends on the axis.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from kernels.flash_attention import dropout
from kernels.flash_attention.problem import Operands, Settings


@dataclass(frozen=True)
class Block:
    """`queries` rows from `start` and `keys` columns from `low`; the sizes are static, the corners may be traced."""

    start: int | Int[Array, ""]
    queries: int
    low: int | Int[Array, ""]
    keys: int

    def of_queries(self, x: Array, axis: int) -> Array:
        """The block's part of an array with an axis of queries."""
        return lax.dynamic_slice_in_dim(x, self.start, self.queries, axis)

    def of_keys(self, x: Array, axis: int) -> Array:
        """The block's part of an array with an axis of keys."""
        return lax.dynamic_slice_in_dim(x, self.low, self.keys, axis)


def visible(block: Block, kv_heads: int, operands: Operands, settings: Settings) -> Bool[Array, "..."]:
    """True where a query sees a key."""
    query, key = _positions(block, operands), _keys(block)
    seen = jnp.ones((1, 1, 1, 1, 1), bool)
    if settings.causal:
        seen = seen & (query >= key)
    if settings.window is not None:
        seen = seen & (query - key < settings.window)
    if operands.kv_lengths is not None:
        seen = seen & (key < operands.kv_lengths[:, None, None, None, None])
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        q_segment = block.of_queries(operands.q_segment_ids, 1)[:, None, None, :, None]
        seen = seen & (q_segment == block.of_keys(operands.kv_segment_ids, 1)[:, None, None, None, :])
    if operands.mask is not None:
        mask = operands.mask
        mask = block.of_queries(mask, 2) if mask.shape[2] > 1 else mask
        mask = block.of_keys(mask, 3) if mask.shape[3] > 1 else mask
        split = (1, 1) if mask.shape[1] == 1 else (kv_heads, mask.shape[1] // kv_heads)
        seen = seen & mask.reshape(mask.shape[0], *split, *mask.shape[2:])
    block_mask = block_mask_of(operands, settings)
    if block_mask is not None:
        q_block = (block.start + jnp.arange(block.queries)) // settings.block_size
        seen = seen & jnp.asarray(block_mask)[q_block[:, None], _keys(block) // settings.block_size]
    return seen


def kept(block: Block, heads: tuple[int, int, int], operands: Operands, settings: Settings) -> Bool[Array, "..."]:
    """True where dropout keeps an element; heads is (batch, kv_heads, group)."""
    batch, kv_heads, group = heads
    first_row, first_head = operands.dropout_offset
    assert operands.dropout_key is not None
    return dropout.keep(
        operands.dropout_key,
        settings.dropout_rate,
        (first_row + jnp.arange(batch))[:, None, None, None, None],
        (first_head + jnp.arange(kv_heads * group)).reshape(1, kv_heads, group, 1, 1),
        _positions(block, operands),
        _keys(block),
    )


def block_mask_of(operands: Operands, settings: Settings) -> np.ndarray | Array | None:
    """The block mask, in NumPy if it is known when tracing."""
    return np.array(settings.block_mask) if settings.block_mask is not None else operands.block_mask


def _positions(block: Block, operands: Operands) -> Int[Array, "..."]:
    positions = (block.start + jnp.arange(block.queries))[:, None]
    return positions if operands.q_offset is None else positions + operands.q_offset[:, None, None, None, None]


def _keys(block: Block) -> Int[Array, " keys"]:
    return block.low + jnp.arange(block.keys)
