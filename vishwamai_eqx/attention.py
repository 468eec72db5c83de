"""Grouped-query attention over flash attention's kernels."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import kernels
from vishwamai_eqx.config import AttentionPattern
from vishwamai_eqx.factors import divisors
from vishwamai_eqx.kv_cache import CacheSlot, KVCache
from vishwamai_eqx.layers import RMSNorm, TPUGEMMLinear, rotate
from vishwamai_eqx.mesh import index, size, vary

Angles = tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]
"""Cosines and sines of the rotary positions, the same for all layers."""


class TPUMultiHeadAttention(eqx.Module):
    """Causal attention with rotary positions; `num_kv_heads` keys and values serve `num_heads` queries (2305.13245).

    With `use_flash_attn` the scores of long rows are never held; without it the reference computes them all. Heads are
    divided over the mesh's `model`; where there are fewer key and value heads than devices, each computes them all and
    attends to its own. `qk_norm_epsilon` norms each head's queries and keys before they are turned (2302.05442), scores
    are multiplied by `scale` (head_dim^-1/2 if not given) and `softcap` bounds them (2408.00118).
    """

    query: TPUGEMMLinear
    key: TPUGEMMLinear
    value: TPUGEMMLinear
    out: TPUGEMMLinear
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    num_heads: int = eqx.field(static=True)
    num_kv_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    pattern: AttentionPattern = eqx.field(static=True)
    window: int = eqx.field(static=True)
    block: int = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    softcap: float | None = eqx.field(static=True)
    dropout_rate: float = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        use_flash_attn: bool = True,
        use_fp8: bool = True,
        *,
        num_kv_heads: int,
        pattern: AttentionPattern = "full",
        window: int = 512,
        block: int = 128,
        qk_norm_epsilon: float | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        dropout_rate: float = 0.0,
        implementation: str | None = None,
        residual_gain: float = 1.0,
        key: PRNGKeyArray,
    ):
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads} is not divisible by num_kv_heads={num_kv_heads}: "
                f"each key and value head serves a whole number of query heads; take one of {divisors(num_heads)}."
            )
        query_key, key_key, value_key, out_key = jax.random.split(key, 4)
        width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        queries, keys, outputs = ("features", num_heads), ("features", num_kv_heads), ("in_features", num_heads)
        self.query = TPUGEMMLinear(hidden_size, width, False, use_fp8, split=queries, key=query_key)
        self.key = TPUGEMMLinear(hidden_size, kv_width, False, use_fp8, split=keys, key=key_key)
        self.value = TPUGEMMLinear(hidden_size, kv_width, False, use_fp8, split=keys, key=value_key)
        self.out = TPUGEMMLinear(width, hidden_size, False, use_fp8, gain=residual_gain, split=outputs, key=out_key)
        normed = qk_norm_epsilon is not None
        self.query_norm = RMSNorm(head_dim, qk_norm_epsilon) if normed else None
        self.key_norm = RMSNorm(head_dim, qk_norm_epsilon) if normed else None
        self.scale, self.softcap = head_dim**-0.5 if scale is None else scale, softcap
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.pattern, self.window, self.block = pattern, window, block
        self.dropout_rate = dropout_rate
        self.implementation = implementation if use_flash_attn else "reference"

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"],
        angles: Angles,
        segment_ids: Int[Array, "batch seq"] | None = None,
        slot: CacheSlot | None = None,
        *,
        key: PRNGKeyArray | None = None,
        first_row: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "batch seq d_model"], KVCache | None]:
        """Attend to the row so far, or with `slot` to the cache; `angles` are those of `positions`.

        `key` turns dropout on; `first_row` is the index, in the whole batch, of this device's first row.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        # One copy for each device along `model`, so that the gradients of its uses are summed here and then once there.
        shared = self.query.operand(vary(x, "model"))
        q = self.query(shared).reshape(heads)
        k, v = (self.own_heads(project(shared).reshape(heads)) for project in (self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        cache, options = None, {"scale": self.scale, "softcap": self.softcap}
        if slot is None:
            options |= self.pattern_options(x.shape[1]) | {"segment_ids": segment_ids}
        else:
            new = jnp.full(x.shape[0], x.shape[1]) if segment_ids is None else (segment_ids > 0).sum(axis=1)
            cache, k, v, slots = slot.extend(k, v, new.astype(jnp.int32), self.window)
            if slots is None:
                options |= self.pattern_options(k.shape[1], positions) | {"q_offset": slot.cache.lengths}
            else:
                distance = positions[:, :, None] - slots[:, None, :]
                visible = (distance >= 0) & (distance < self.window) & (slots >= 0)[:, None, :]
                options |= {"mask": visible[:, None], "causal": False}
        if key is not None and self.dropout_rate > 0:
            options |= {
                "dropout_rate": self.dropout_rate,
                "dropout_key": key,
                "dropout_offset": (first_row, index("model") * q.shape[2]),
            }
        y = kernels.flash_attention(q, k, v, implementation=self.implementation, **options)
        assert isinstance(y, Array)  # alone, without the log-sum-exp
        return self.out(self.out.operand(y.reshape(*x.shape[:2], -1))), cache

    def own_heads(
        self, kv: Float[Array, "batch seq kv_heads head_dim"]
    ) -> Float[Array, "batch seq own_kv_heads head_dim"]:
        """Of all heads the one that this device's queries attend to, where devices share it."""
        if size("model") <= self.num_kv_heads:
            return kv
        head = index("model") * self.num_kv_heads // size("model")
        return jax.lax.dynamic_slice_in_dim(kv, head, 1, axis=2)

    def pattern_options(self, length: int, positions: Int[Array, "batch seq"] | None = None) -> dict[str, Any]:
        """The pattern as the kernel's window or mask: over a row, or for queries at `positions` of a longer cache."""
        if self.pattern == "window":
            return {"window": self.window}
        if self.pattern == "blocks":
            blocks = block_pattern(math.ceil(length / self.block))
            if positions is None:
                return {"mask": blocks, "block_size": self.block}
            # Queries of a cache start anywhere, in each row elsewhere, so their blocks are looked up one by one.
            rows = jnp.asarray(blocks)[positions // self.block]
            return {"mask": jnp.repeat(rows, self.block, axis=-1)[:, None, :, :length]}
        return {}


def block_pattern(blocks: int) -> Bool[np.ndarray, "blocks blocks"]:
    """Which blocks of keys a block of queries sees: its own, the one before, and the first of the row."""
    query, key = np.arange(blocks)[:, None], np.arange(blocks)[None, :]
    return (key <= query) & ((query - key <= 1) | (key == 0))
