"""Attention in pure JAX, by blocks of queries, with its own gradient.

Short sequences (`_short`): each block of queries meets all the keys it may see at once, and the probabilities are kept
for the backward pass. Long ones (`tiles.attend`): an online softmax over tiles, of which only the statistics are kept.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.compat import accumulator, vary_alike
from kernels.flash_attention import tiles
from kernels.flash_attention.problem import Operands, Settings
from kernels.flash_attention.scores import Block, kept, visible

# Scores of one head up to which the probabilities are kept: beyond, memory costs more than computing them again.
SHORT = 512 * 512
# Queries of a block at least. 64 would skip more of a causal square and be 10% faster, for twice the compile time.
QUERIES = 128
# Blocks of queries at most: each is a part of the program, about a second of compile time on CPU with its gradient.
BLOCKS = 4


def flash_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    operands: Operands,
    settings: Settings,
) -> tuple[Float[Array, "batch q_len heads head_dim"], Float[Array, "batch heads q_len"]]:
    """The result in q's type and the log-sum-exp of each row in f32."""
    batch, q_len, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    grouped = q.reshape(batch, q_len, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    attend = _short if q_len * kv_len <= SHORT else tiles.attend
    grouped, keys, values, operands = vary_alike((grouped, keys, values, operands))
    out, lse = attend(grouped, keys, values, operands, settings)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape), lse.reshape(batch, heads, q_len)


def _unrolled(q, k, v, operands, settings) -> tuple[jax.Array, jax.Array]:
    """q [batch, kv_heads, group, q_len, head_dim], k and v [batch, kv_heads, kv_len, head_dim]."""
    return _forward(q, k, v, operands, settings)[0]


_short = jax.custom_vjp(_unrolled, nondiff_argnums=(4,))


def _forward(q, k, v, operands, settings):
    outs, lses, saved = [], [], []
    for block in _blocks(q.shape[3], k.shape[2], operands, settings):
        out, lse, probabilities = _forward_block(q, k, v, operands, settings, block)
        outs.append(out)
        lses.append(lse)
        saved.append(probabilities)
    out, lse = jnp.concatenate(outs, 3), jnp.concatenate(lses, 3)
    return (out, lse), (q, k, v, operands, out, lse, saved)


def _forward_block(q, k, v, operands, settings, block):
    """One block's result and log-sum-exp, and for the backward pass its unnormalised probabilities and their sums."""
    seen = visible(block, k.shape[1], operands, settings)
    scores = jnp.where(seen, _scores(block.of_queries(q, 3), block.of_keys(k, 2), settings), -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jnp.where(top == -jnp.inf, 0, top)
    # The barrier keeps XLA from computing the exponentials once for the sum and again for the product.
    weights = lax.optimization_barrier(jnp.exp(scores - top).astype(q.dtype))
    total = jnp.sum(weights, axis=-1, keepdims=True, dtype=accumulator(q.dtype))
    nonzero = jnp.where(total > 0, total, 1)
    attended = weights
    if operands.dropout_key is not None:
        attended = jnp.where(kept(block, q.shape[:3], operands, settings), weights, 0)
    out = _dot(attended, block.of_keys(v, 2), (4,), (2,)) / (nonzero * (1 - settings.dropout_rate))
    lse = jnp.where(total > 0, top + jnp.log(nonzero), -jnp.inf)[..., 0]
    return out.astype(q.dtype), lse, (weights, nonzero)


def _backward(settings, saved, cotangents):
    q, k, v, operands, out, lse, saved_blocks = saved
    g, g_lse = cotangents
    wide = accumulator(q.dtype)
    # A row without keys has a log-sum-exp of -inf, of which the caller's gradient may be anything.
    delta = jnp.sum(out.astype(wide) * g.astype(wide), axis=-1) - jnp.where(lse == -jnp.inf, 0, g_lse)
    dk, dv = jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    dqs = []
    blocks = _blocks(q.shape[3], k.shape[2], operands, settings)
    for block, (weights, total) in zip(blocks, saved_blocks, strict=True):
        q_block, k_block, v_block = block.of_queries(q, 3), block.of_keys(k, 2), block.of_keys(v, 2)
        # What normalises a row scales its output's gradient instead, which is head_dim wide and not kv_len.
        g_block = (block.of_queries(g, 3).astype(wide) / total).astype(q.dtype)
        delta_block = block.of_queries(delta, 3)[..., None] / total
        d_weights = _dot(g_block, v_block, (4,), (3,))
        attended = weights
        if operands.dropout_key is not None:
            keep = kept(block, q.shape[:3], operands, settings)
            share = 1 / (1 - settings.dropout_rate)
            attended = jnp.where(keep, weights * jnp.asarray(share, q.dtype), 0)
            d_weights = jnp.where(keep, d_weights * share, 0)
        d_scores = weights.astype(wide) * (d_weights - delta_block)
        if settings.softcap is not None:
            capped = _scores(q_block, k_block, settings) / settings.softcap
            d_scores = d_scores * (1 - capped * capped)
        d_scores = d_scores.astype(q.dtype)
        dqs.append((_dot(d_scores, k_block, (4,), (2,)) * settings.scale).astype(q.dtype))
        at = (slice(None), slice(None), slice(block.low, block.low + block.keys))
        dk = dk.at[at].add(_over_queries(d_scores, q_block) * settings.scale)
        dv = dv.at[at].add(_over_queries(attended, g_block))
    return jnp.concatenate(dqs, 3), dk.astype(k.dtype), dv.astype(v.dtype), None


_short.defvjp(_forward, _backward)


def _blocks(q_len, kv_len, operands, settings):
    """Blocks of queries with the range of keys that any of them may see, as far as that is known when tracing."""
    blocks = []
    size = max(QUERIES, -(-q_len // BLOCKS))
    for start in range(0, q_len, size):
        stop = min(start + size, q_len)
        low, high = 0, kv_len
        if operands.q_offset is None:
            high = min(high, stop) if settings.causal else high
            low = max(low, start - settings.window + 1) if settings.window is not None else low
        if settings.block_mask is not None:
            rows = settings.block_mask[start // settings.block_size : (stop - 1) // settings.block_size + 1]
            columns = [column for row in rows for column, seen in enumerate(row) if seen]
            low = max(low, min(columns, default=0) * settings.block_size)
            high = min(high, (max(columns, default=-1) + 1) * settings.block_size)
        # A block that sees nothing keeps one key, masked, so that no array is empty.
        high = max(high, 1)
        low = min(low, high - 1)
        blocks.append(Block(start, stop - start, low, high - low))
    return blocks


def _scores(q, k, settings):
    scores = _dot(q, k, (4,), (3,)) * settings.scale
    if settings.softcap is not None:
        scores = settings.softcap * jnp.tanh(scores / settings.softcap)
    return scores


def _over_queries(a, b):
    """Contract group and queries: as two dimensions in 16 bits, where XLA then makes a copy and a fast NN product."""
    if a.dtype.itemsize == 2:
        return _dot(a, b, (2, 3), (2, 3))
    a, b = (x.reshape(*x.shape[:2], -1, x.shape[4]) for x in (a, b))
    return _dot(a, b, (2,), (2,))


def _dot(a, b, contract_a, contract_b):
    return lax.dot_general(
        a, b, ((contract_a, contract_b), ((0, 1), (0, 1))), preferred_element_type=accumulator(a.dtype)
    )
