"""Attention with the whole score matrix, in f32, as the definition has it."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.compat import accumulator
from kernels.flash_attention import dropout
from kernels.flash_attention.problem import Operands, Settings


def flash_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    operands: Operands,
    settings: Settings,
) -> tuple[Float[Array, "batch q_len heads head_dim"], Float[Array, "batch heads q_len"]]:
    """The result in q's type and the log-sum-exp of each row in f32."""
    batch, q_len, heads, _ = q.shape
    kv_len, kv_heads = k.shape[1:3]
    wide = accumulator(q.dtype)
    keys, values = (jnp.repeat(x.astype(wide), heads // kv_heads, axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q.astype(wide), keys, precision="highest") * settings.scale
    if settings.softcap is not None:
        scores = settings.softcap * jnp.tanh(scores / settings.softcap)
    visible = jnp.broadcast_to(_visible(batch, q_len, kv_len, operands, settings), scores.shape)
    # Rows with nothing to attend to: every exponential is zero, and so are the quotient and its gradient.
    top = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=-jnp.inf)
    top = jnp.where(jnp.isfinite(top), top, 0)
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores, 0) - top), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    nonzero = jnp.where(total > 0, total, 1)
    probabilities = weights / nonzero
    lse = jnp.where(total > 0, top + jnp.log(nonzero), -jnp.inf)[..., 0]
    if operands.dropout_key is not None:
        kept = _kept(batch, heads, q_len, kv_len, operands, settings)
        probabilities = jnp.where(kept, probabilities / (1 - settings.dropout_rate), 0)
    out = jnp.einsum("bhqk,bkhd->bqhd", probabilities, values, precision="highest")
    return out.astype(q.dtype), lse


def _visible(batch: int, q_len: int, kv_len: int, operands: Operands, settings: Settings) -> Bool[Array, "..."]:
    q_index = jnp.arange(q_len)[:, None]
    kv_index = jnp.arange(kv_len)[None, :]
    offset = jnp.zeros(batch, jnp.int32) if operands.q_offset is None else operands.q_offset
    q_position = q_index + offset[:, None, None, None]
    visible = jnp.ones((batch, 1, q_len, kv_len), bool)
    if settings.causal:
        visible &= q_position >= kv_index
    if settings.window is not None:
        visible &= q_position - kv_index < settings.window
    if operands.kv_lengths is not None:
        visible &= kv_index < operands.kv_lengths[:, None, None, None]
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        visible &= (operands.q_segment_ids[:, :, None] == operands.kv_segment_ids[:, None, :])[:, None]
    if operands.mask is not None:
        visible = visible & operands.mask
    block_mask = settings.block_mask if operands.block_mask is None else operands.block_mask
    if block_mask is not None:
        block = settings.block_size
        visible &= jnp.asarray(block_mask)[q_index // block, kv_index // block]
    return visible


def _kept(batch: int, heads: int, q_len: int, kv_len: int, operands: Operands, settings: Settings):
    first_row, first_head = operands.dropout_offset
    offset = jnp.zeros(batch, jnp.int32) if operands.q_offset is None else operands.q_offset
    return dropout.keep(
        operands.dropout_key,
        settings.dropout_rate,
        (first_row + jnp.arange(batch))[:, None, None, None],
        (first_head + jnp.arange(heads))[:, None, None],
        offset[:, None, None, None] + jnp.arange(q_len)[:, None],
        jnp.arange(kv_len),
    )
