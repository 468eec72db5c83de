"""The backward TPU kernel: all three gradients in one pass over the blocks that some query sees.

Each block's scores are computed again from the saved log-sum-exp, once: five products a block. The gradients of keys
and values stay in vector memory while the queries of all heads that share them pass.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.compat import output_like
from kernels.flash_attention.pallas_scores import LOG2_E, Block, Position, kept, scores, spec, step_scalars, unseen
from kernels.flash_attention.pallas_tables import DIAGONAL, FIRST, FULL, LAST, Schedule


def backward(
    rows: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    columns: tuple[jax.Array, jax.Array, jax.Array],
    elements: dict[str, tuple[jax.Array, pl.BlockSpec]],
    numbers: jax.Array,
    table: Schedule,
    position: Position,
    block: Block,
    resident: tuple[int, int],
    dq_dtype: Any,
    options: dict[str, Any],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q [batch, heads, head_dim, q_len], k and v [batch, kv_heads, kv_len, head_dim].

    `rows` are the scaled q and the result's gradient [batch, heads, q_len, head_dim], the log-sum-exp in powers of two
    and delta, the sum of the result times its gradient [batch, heads, 1, q_len]; `columns` are k and v
    [batch, kv_heads, kv_len, head_dim] and k transposed. The table visits keys in the range `resident` only, and only
    theirs are the gradients of k and v.
    """
    q, k = rows[0], columns[0]
    batch, heads, q_len, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    wide = spec((None, None, block.q, head_dim), position, lambda b, h, i, j: (b, h, i, 0))
    thin = spec((None, None, 1, block.q), position, lambda b, h, i, j: (b, h, 0, i))
    column = spec((None, None, block.kv, head_dim), position, lambda b, h, i, j: (b, h // group, j, 0))
    transposed = spec((None, None, head_dim, block.kv), position, lambda b, h, i, j: (b, h // group, 0, j))
    specs = (wide, wide, thin, thin, column, column, transposed)
    names = ("q", "g", "lse", "delta", "k", "v", "k_transposed", *elements)
    keys = resident[1] - resident[0]
    gradient = spec((None, None, keys, head_dim), position, lambda b, h, i, j: (b, h // group, 0, 0))
    kernel = functools.partial(_kernel, names=names, table=table, block=block, first_key=resident[0])
    return pl.pallas_call(
        kernel,
        name="flash_attention_bwd",
        out_shape=[
            output_like(q, (batch, heads, head_dim, q_len), dq_dtype),
            output_like(q, (batch, kv_heads, keys, head_dim), k.dtype),
            output_like(q, (batch, kv_heads, keys, head_dim), k.dtype),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, group, table.steps),
            in_specs=[*specs, *(it[1] for it in elements.values())],
            out_specs=[
                spec((None, None, head_dim, block.q), position, lambda b, h, i, j: (b, h, 0, i)),
                gradient,
                gradient,
            ],
            scratch_shapes=[
                pltpu.VMEM((head_dim, block.q), jnp.float32),
                pltpu.VMEM((keys, head_dim), jnp.float32),
                pltpu.VMEM((keys, head_dim), jnp.float32),
            ],
        ),
        **options,
    )(table.words, numbers, *rows, *columns, *(it[0] for it in elements.values()))


def _kernel(words, numbers, *rest, names, table, block, first_key):
    refs = dict(zip(names, rest, strict=False))
    dq, dk, dv, dq_sum, dk_sum, dv_sum = rest[len(names) :]
    batch, head, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    word = table.word(words, batch, step)
    scalars = step_scalars(block, numbers, batch, word)
    settings = block.settings

    @pl.when((head == 0) & (step == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(word & FIRST != 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)

    def differentiate(part, kind):
        rows, keys = part.queries.slice, part.keys.slice
        q, g, k = refs["q"][rows, :], refs["g"][rows, :], refs["k"][keys, :]
        values, capped = scores(block, q, k)
        if kind != FULL:
            values = unseen(block, values, refs, scalars, part, kind == DIAGONAL)
        probabilities = jnp.exp2(values - refs["lse"][:, rows])
        d_weights = block.dot(refs["v"][keys, :], g, (1, 1))
        attended = probabilities
        if "row_words" in refs:
            keep = kept(block, refs, part)
            attended = jnp.where(keep, probabilities, 0.0)
            d_weights = jnp.where(keep, d_weights * (1 / (1 - settings.dropout_rate)), 0.0)
        d_scores = probabilities * (d_weights - refs["delta"][:, rows])
        if capped is not None:
            d_scores = d_scores * (1 - capped * capped)
        start = pl.multiple_of(scalars["kv_start"] - first_key, block.kv)
        resident = pl.ds(start, part.keys.size)
        dv_sum[resident, :] += block.dot(attended, g)
        dk_sum[resident, :] += block.dot(d_scores, q)
        dq_sum[:, rows] += block.dot(refs["k_transposed"][:, keys], d_scores)

    def differentiate_all(kind):
        for part in block.parts(kind == DIAGONAL):
            differentiate(part, kind)

    for kind in table.kinds:
        pl.when(word & kind != 0)(functools.partial(differentiate_all, kind))

    @pl.when(word & LAST != 0)
    def _():
        dq[...] = (dq_sum[...] * settings.scale).astype(dq.dtype)

    @pl.when((head == pl.num_programs(2) - 1) & (step == pl.num_programs(3) - 1))
    def _():
        # q was multiplied before its product with k, which gives its multiplier to the gradient of k.
        dk[...] = (dk_sum[...] * (1 / LOG2_E if settings.softcap is None else settings.softcap)).astype(dk.dtype)
        dv[...] = (dv_sum[...] * (1 / (1 - settings.dropout_rate))).astype(dv.dtype)
