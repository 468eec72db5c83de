"""The public `flash_attention`: validation, and the choice of an implementation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from kernels.choice import choose_kernel
from kernels.flash_attention import pallas_tpu, reference, xla
from kernels.flash_attention.problem import Operands, Settings

_IMPLEMENTATIONS = {
    "reference": reference.flash_attention,
    "xla": xla.flash_attention,
    "pallas_tpu": pallas_tpu.flash_attention,
}

Attended = Float[Array, "batch q_len heads head_dim"]
LogSumExp = Float[Array, "batch heads q_len"]
SegmentIds = Int[Array, "batch q_len"] | tuple[Int[Array, "batch q_len"], Int[Array, "batch kv_len"]]


def flash_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Num[Array, "batch kv_len kv_heads head_dim"],
    v: Num[Array, "batch kv_len kv_heads head_dim"],
    mask: Bool[Array, "..."] | Bool[np.ndarray, "..."] | None = None,
    block_size: int = 128,
    *,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    q_offset: Int[Array, " batch"] | None = None,
    kv_lengths: Int[Array, " batch"] | None = None,
    k_scale: Float[Array, "#batch #kv_len #kv_heads"] | None = None,
    v_scale: Float[Array, "#batch #kv_len #kv_heads"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    dropout_offset: tuple[int | Int[Array, ""], int | Int[Array, ""]] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: Any = None,
) -> Attended | tuple[Attended, LogSumExp]:
    """Attend without holding the score matrix: softmax(scale q kᵀ) v, each kv head serving heads / kv_heads heads.

    s[i, j] = scale q[i]·k[j], then softcap tanh(s / softcap); a query at position p = q_offset + i sees key j where
    j <= p (causal), p - j < window, j < kv_lengths, the segments are equal, and the mask is True. A row that sees
    nothing gives zeros, has zero gradients, and a log-sum-exp of -inf.

    - `mask` broadcasts to [batch, heads, q_len, kv_len], or is a block mask [ceil(q_len / block_size),
      ceil(kv_len / block_size)]. A NumPy block mask is known when tracing: its empty blocks are not in the program.
    - `segment_ids` is one array for queries and keys, or a pair.
    - `scale` is head_dim ** -0.5 if not given.
    - `q_offset` and `kv_lengths` are for decoding against a cache: query i of a row is at position q_offset + i.
    - `k_scale` and `v_scale` multiply a quantised k and v, a number for each key and kv head (sizes of 1 broadcast).
    - Dropout keeps an element by a hash of (dropout_key, batch row, head, position of the query, index of the key),
      the same in every implementation; `dropout_offset` is the global (batch row, head) of a shard's first ones.
    - `interpret` runs the Pallas kernels without a TPU: `pltpu.InterpretParams()`, or True.
    - `return_lse` adds the log-sum-exp of each row, f32 [batch, heads, q_len], with its gradient.

    Flash attention is arXiv 2205.14135 and 2307.08691; soft-cap is arXiv 2408.00118.

    **Raises** ValueError for settings that contradict each other or the shapes.
    """
    _check_shapes(q, k, v)
    _check(q, k, segment_ids, window, softcap, scale, block_size, dropout_rate, dropout_key, k_scale, v_scale)
    attend = choose_kernel("flash_attention", implementation, _IMPLEMENTATIONS, "q", q.dtype, interpret)
    dense, block_mask = _split_mask(mask, q, k, block_size)
    concrete = isinstance(block_mask, np.ndarray)
    settings = Settings(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=causal,
        window=window,
        softcap=softcap,
        dropout_rate=float(dropout_rate),
        block_size=block_size,
        block_mask=tuple(tuple(bool(x) for x in row) for row in block_mask) if concrete else None,
    )
    segments = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    row, head = (0, 0) if dropout_offset is None else dropout_offset
    operands = Operands(
        q_segment_ids=segments[0],
        kv_segment_ids=segments[1],
        mask=dense,
        block_mask=None if concrete else block_mask,
        q_offset=q_offset,
        kv_lengths=kv_lengths,
        dropout_key=_key_words(dropout_key) if dropout_rate > 0 else None,
        dropout_offset=(jnp.asarray(row, jnp.int32), jnp.asarray(head, jnp.int32)),
    )
    k, v = _dequantise(k, k_scale, q.dtype), _dequantise(v, v_scale, q.dtype)
    with jax.named_scope("flash_attention"):
        out, lse = attend(q, k, v, operands, settings)
    return (out, lse) if return_lse else out


def _check_shapes(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"flash_attention: {name} has shape {list(x.shape)}, expected 4 axes [batch, length, heads, head_dim]; "
                "add those of size 1"
            )
    if k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"flash_attention: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must agree in batch and "
            "head_dim, k and v in all axes; pass [batch, length, heads, head_dim]"
        )


def _check(q, k, segment_ids, window, softcap, scale, block_size, dropout_rate, dropout_key, k_scale, v_scale) -> None:
    heads, kv_heads = q.shape[2], k.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"flash_attention: heads={heads} must be a multiple of kv_heads={kv_heads}; "
            "give k and v a number of heads that divides that of q"
        )
    if segment_ids is not None and not isinstance(segment_ids, tuple) and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"flash_attention: one segment_ids array serves q and k of equal length, not q_len={q.shape[1]} and "
            f"kv_len={k.shape[1]}; pass the pair (q_segment_ids, kv_segment_ids)"
        )
    for name, value in (("window", window), ("block_size", block_size)):
        if value is not None and value < 1:
            raise ValueError(f"flash_attention: {name}={value} must be at least 1; pass 1 or more")
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is not None and not (math.isfinite(value) and (name == "scale" or value > 0)):
            raise ValueError(f"flash_attention: {name}={value} must be a positive number; leave it out to have none")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"flash_attention: dropout_rate={dropout_rate} must be in [0, 1); pass a share below 1")
    if dropout_rate > 0 and dropout_key is None:
        raise ValueError(
            f"flash_attention: dropout_rate={dropout_rate} needs dropout_key; pass jax.random.key(seed), or rate 0"
        )
    for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        if value is None and not jnp.issubdtype(k.dtype, jnp.floating):
            raise ValueError(
                f"flash_attention: {name}=None, but k and v are {k.dtype}; pass the scales of quantisation"
            )


def _split_mask(mask, q, k, block_size):
    """The mask as (dense 4-dimensional, block mask); where a shape could mean both, both mean the same."""
    if mask is None:
        return None, None
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    blocks = (-(-q.shape[1] // block_size), -(-k.shape[1] // block_size))
    if mask.shape == blocks:
        return None, mask
    try:
        broadcasts = np.broadcast_shapes(mask.shape, full) == full
    except ValueError:
        broadcasts = False
    if not broadcasts:
        raise ValueError(
            f"flash_attention: mask has shape {list(mask.shape)}, expected one that broadcasts to [batch, heads, "
            f"q_len, kv_len] = {list(full)}, or a block mask {list(blocks)} of {block_size} each; reshape it to either"
        )
    return jnp.asarray(mask).reshape((1,) * (4 - mask.ndim) + mask.shape), None


def _dequantise(x, scale, dtype):
    if scale is None:
        return x.astype(dtype)
    return (x.astype(scale.dtype) * scale[..., None]).astype(dtype)


def _key_words(key):
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
