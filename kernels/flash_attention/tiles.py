"""Long sequences: tiles of the score matrix with an online softmax, invisible tiles skipped.

For each tile of queries a table lists the tiles of keys that any of its queries may see. With causal and window masks
and a NumPy block mask it is a constant; with a traced block mask, `q_offset` or `kv_lengths` it is computed, and the
loop over keys is as long as it says. The backward pass computes the scores again from the saved log-sum-exp.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels.compat import accumulator, zeros_varying_like
from kernels.flash_attention.problem import Operands, Settings
from kernels.flash_attention.scores import Block, block_mask_of, kept, visible

# Tiles of one head fit the second-level cache of a core in f32, and products are large enough for its matrix unit.
QUERIES = 256
KEYS = 512


def attend(q, k, v, operands: Operands, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """q [batch, kv_heads, group, q_len, head_dim], k and v [batch, kv_heads, kv_len, head_dim] -> (out, lse)."""
    q_len, kv_len = q.shape[3], k.shape[2]
    q_pad, kv_pad = -q_len % QUERIES, -kv_len % KEYS
    if kv_pad:
        lengths = jnp.full(q.shape[:1], kv_len) if operands.kv_lengths is None else operands.kv_lengths
        operands = operands._replace(kv_lengths=jnp.minimum(lengths, kv_len))
    mask = operands.mask
    if mask is not None:
        mask = mask if mask.shape[2] == 1 else _pad(mask, 2, q_pad)
        mask = mask if mask.shape[3] == 1 else _pad(mask, 3, kv_pad)
    operands = operands._replace(
        q_segment_ids=_pad(operands.q_segment_ids, 1, q_pad),
        kv_segment_ids=_pad(operands.kv_segment_ids, 1, kv_pad),
        mask=mask,
    )
    q_tiles = _split(_pad(q, 3, q_pad), 3, QUERIES)
    k_tiles, v_tiles = (_split(_pad(x, 2, kv_pad), 2, KEYS) for x in (k, v))
    out, lse = _attend(q_tiles, k_tiles, v_tiles, operands, settings)
    return _join(out, 3)[:, :, :, :q_len], _join(lse, 3)[:, :, :, :q_len]


def _tiled(q, k, v, operands, settings) -> tuple[jax.Array, jax.Array]:
    """The tiles of q [tiles, batch, kv_heads, group, QUERIES, head_dim] over those of k and v."""
    wide = accumulator(q.dtype)

    def row(_, tile):
        index, q_tile, order, count = tile

        def column(t, carry):
            top, total, out = carry
            block = Block(index * QUERIES, QUERIES, order[t] * KEYS, KEYS)
            scores = _scores(q_tile, k[order[t]], settings)
            scores = jnp.where(visible(block, k.shape[2], operands, settings), scores, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            finite = jnp.where(new_top == -jnp.inf, 0, new_top)
            weights, rescale = jnp.exp(scores - finite), jnp.exp(top - finite)
            total = total * rescale + jnp.sum(weights, axis=-1, keepdims=True)
            if operands.dropout_key is not None:
                weights = jnp.where(kept(block, q_tile.shape[:3], operands, settings), weights, 0)
            return new_top, total, out * rescale + _dot(weights.astype(q.dtype), v[order[t]], (4,), (2,))

        statistic = zeros_varying_like((*q_tile.shape[:4], 1), wide, q)
        start = statistic - jnp.inf, statistic, zeros_varying_like(q_tile.shape, wide, q)
        top, total, out = lax.fori_loop(0, count, column, start)
        nonzero = jnp.where(total > 0, total, 1)
        out = out / (nonzero * (1 - settings.dropout_rate))
        return None, (out.astype(q.dtype), jnp.where(total > 0, top + jnp.log(nonzero), -jnp.inf)[..., 0])

    return lax.scan(row, None, _rows(q, k, operands, settings))[1]


_attend = jax.custom_vjp(_tiled, nondiff_argnums=(4,))


def _forward(q, k, v, operands, settings):
    out, lse = _tiled(q, k, v, operands, settings)
    return (out, lse), (q, k, v, operands, out, lse)


def _backward(settings, saved, cotangents):
    q, k, v, operands, out, lse = saved
    g, g_lse = cotangents
    wide = accumulator(q.dtype)
    # A row without keys: exp(-inf - 0) is the zero it needs, and what the caller makes of its -inf may be anything.
    delta = jnp.sum(out.astype(wide) * g.astype(wide), axis=-1) - jnp.where(lse == -jnp.inf, 0, g_lse)
    finite_lse = jnp.where(lse == -jnp.inf, 0, lse)

    def row(carry, tile):
        (index, q_tile, order, count), g_tile, lse_tile, delta_tile = tile

        def column(t, carry):
            dq, dk, dv = carry
            block = Block(index * QUERIES, QUERIES, order[t] * KEYS, KEYS)
            k_tile, v_tile = k[order[t]], v[order[t]]
            scores = _scores(q_tile, k_tile, settings)
            seen = visible(block, k.shape[2], operands, settings)
            probabilities = jnp.exp(jnp.where(seen, scores, -jnp.inf) - lse_tile[..., None])
            d_weights = _dot(g_tile, v_tile, (4,), (3,))
            attended = probabilities
            if operands.dropout_key is not None:
                share = jnp.where(kept(block, q_tile.shape[:3], operands, settings), 1 / (1 - settings.dropout_rate), 0)
                attended, d_weights = probabilities * share, d_weights * share
            d_scores = probabilities * (d_weights - delta_tile[..., None]) * settings.scale
            if settings.softcap is not None:
                d_scores = d_scores * (1 - (scores / settings.softcap) ** 2)
            d_scores = d_scores.astype(q.dtype)
            dk = dk.at[order[t]].add(_dot(d_scores, q_tile, (2, 3), (2, 3)))
            dv = dv.at[order[t]].add(_dot(attended.astype(q.dtype), g_tile, (2, 3), (2, 3)))
            return dq + _dot(d_scores, k_tile, (4,), (2,)), dk, dv

        dq, dk, dv = lax.fori_loop(0, count, column, (zeros_varying_like(q_tile.shape, wide, q), *carry))
        return (dk, dv), dq.astype(q.dtype)

    start = zeros_varying_like(k.shape, wide, k), zeros_varying_like(v.shape, wide, v)
    (dk, dv), dq = lax.scan(row, start, (_rows(q, k, operands, settings), g, finite_lse, delta))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _rows(q, k, operands, settings):
    """For each tile of queries: its index, itself, the tiles of keys with the visible ones first, and their number."""
    seen = _visible_tiles(q.shape[0], k.shape[0], operands, settings)
    order = jnp.argsort(jnp.asarray(~seen), axis=1, stable=True).astype(jnp.int32)
    return jnp.arange(q.shape[0], dtype=jnp.int32), q, order, jnp.sum(jnp.asarray(seen), axis=1, dtype=jnp.int32)


def _visible_tiles(q_tiles, kv_tiles, operands, settings):
    """True where any query of a tile may see any key of a tile, for all rows of the batch together."""
    first_q, first_k = np.arange(q_tiles)[:, None] * QUERIES, np.arange(kv_tiles)[None, :] * KEYS
    last_q, last_k = first_q + QUERIES - 1, first_k + KEYS - 1
    least, most = (0, 0) if operands.q_offset is None else (jnp.min(operands.q_offset), jnp.max(operands.q_offset))
    seen = np.ones((q_tiles, kv_tiles), bool)
    if settings.causal:
        seen = seen & (last_q + most >= first_k)
    if settings.window is not None:
        seen = seen & (first_q + least - last_k < settings.window)
    if operands.kv_lengths is not None:
        seen = seen & (first_k < jnp.max(operands.kv_lengths))
    block_mask = block_mask_of(operands, settings)
    if block_mask is not None:
        # Blocks need not divide tiles: count the blocks that a tile touches by differences of a table of sums.
        xp = np if isinstance(block_mask, np.ndarray) else jnp
        sums = xp.pad(xp.cumsum(xp.cumsum(block_mask, axis=0), axis=1), ((1, 0), (1, 0)))
        rows, columns = block_mask.shape
        block = settings.block_size
        top, bottom = np.minimum(first_q // block, rows), np.minimum(last_q // block + 1, rows)
        left, right = np.minimum(first_k // block, columns), np.minimum(last_k // block + 1, columns)
        seen = seen & (sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left] > 0)
    return seen


def _scores(q, k, settings):
    scores = _dot(q, k, (4,), (3,)) * settings.scale
    if settings.softcap is not None:
        scores = settings.softcap * jnp.tanh(scores / settings.softcap)
    return scores


def _dot(a, b, contract_a, contract_b):
    contract = ((contract_a, contract_b), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, contract, preferred_element_type=accumulator(a.dtype))


def _pad(x, axis, amount):
    if x is None or amount == 0:
        return x
    return jnp.pad(x, [(0, amount if i == axis else 0) for i in range(x.ndim)])


def _split(x, axis, size):
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(x, axis):
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
