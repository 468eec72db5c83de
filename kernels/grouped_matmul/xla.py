"""Blocks of rows, each of one group: a batched product with the block's weight gathered.

`lax.ragged_dot` on CPU computes every group for every row. Here the work is that of the rows, plus at most one block a
group, whatever the sizes, with static shapes and no branch.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels.compat import accumulator, narrow_dot, vary_alike

# Rows of a block at most: measured against 128 and 512 at 8192 rows, 8 groups. Groups that are aligned to fewer rows,
# because they have few, make smaller blocks, as long as the weights that each block gathers are worth it.
BLOCK = 256
SMALLEST_BLOCK = 8
_BATCH = ((0,), (0,))


def grouped_matmul(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "groups ..."],
    group_sizes: Int[Array, " groups"],
    row_alignment: int,
    transposed: bool,
) -> Float[Array, "rows n"]:
    """out[r] = lhs[r] @ rhs[group of r]; zero beyond the last group."""
    lhs, rhs, group_sizes = vary_alike((lhs, rhs, group_sizes))
    block = math.gcd(row_alignment, lhs.shape[0], BLOCK)
    if block >= SMALLEST_BLOCK:
        return _aligned(lhs, rhs, group_sizes, transposed, block)
    groups, rows = rhs.shape[0], lhs.shape[0]
    aligned_sizes = -(-group_sizes // BLOCK) * BLOCK
    aligned_rows = (-(-rows // BLOCK) + groups) * BLOCK
    ends = jnp.cumsum(group_sizes)
    group = jnp.searchsorted(ends, jnp.arange(rows), side="right")
    shift = jnp.append((jnp.cumsum(aligned_sizes) - aligned_sizes) - (ends - group_sizes), 0)
    owned = group < groups
    position = jnp.where(owned, jnp.arange(rows) + shift[group], aligned_rows)
    spread = jnp.zeros((aligned_rows, lhs.shape[1]), lhs.dtype).at[position].set(lhs, mode="drop", unique_indices=True)
    out = _aligned(spread, rhs, aligned_sizes, transposed, BLOCK)
    return out.at[position].get(mode="fill", fill_value=0, unique_indices=True)


def _value(lhs, rhs, group_sizes, transposed, block) -> jax.Array:
    rows, k = lhs.shape
    weights = _weights(rhs, lhs.dtype, _group_of_block(rows, group_sizes, block))
    return narrow_dot(lhs.reshape(-1, block, k), weights, ((2,), (2 if transposed else 1,)), _BATCH).reshape(rows, -1)


_aligned = jax.custom_vjp(_value, nondiff_argnums=(3, 4))


def _forward(lhs, rhs, group_sizes, transposed, block):
    return _value(lhs, rhs, group_sizes, transposed, block), (lhs, rhs, group_sizes)


def _backward(transposed, block, saved, g):
    lhs, rhs, group_sizes = saved
    rows, k = lhs.shape
    group = _group_of_block(rows, group_sizes, block)
    weights = _weights(rhs, lhs.dtype, group)
    g_blocks = g.reshape(-1, block, g.shape[1])
    d_lhs = narrow_dot(g_blocks, weights, ((2,), (1 if transposed else 2,)), _BATCH).reshape(rows, k)
    first, second = lhs.reshape(-1, block, k), g_blocks
    if lhs.dtype.itemsize == 2:
        # In 16 bits contracting two dimensions is 3 times faster than one, of which XLA makes a TN product.
        first, second = (side.reshape(-1, 2, block // 2, side.shape[2]) for side in (first, second))
    first, second = (second, first) if transposed else (first, second)
    contract = tuple(range(1, first.ndim - 1))
    wide = accumulator(lhs.dtype)
    per_block = lax.dot_general(first, second, ((contract, contract), _BATCH), preferred_element_type=wide)
    # The sum by group as a product: a scatter-add runs on one core. A block beyond the last group is in no column.
    of_group = group == jnp.arange(rhs.shape[0])[:, None]
    d_rhs = jnp.tensordot(of_group.astype(per_block.dtype), per_block, 1, precision="highest")
    return d_lhs, d_rhs.astype(rhs.dtype), None


_aligned.defvjp(_forward, _backward)


def _group_of_block(rows, group_sizes, block):
    """Each block's group; the number of groups for a block beyond the last."""
    return jnp.sum(jnp.cumsum(group_sizes) <= jnp.arange(0, rows, block)[:, None], axis=1, dtype=jnp.int32)


def _weights(rhs, dtype, group):
    """Each block's weight; zeros beyond the last group, which cost nothing here and a pass over the result there."""
    return rhs.astype(dtype).at[group].get(mode="fill", fill_value=0)
