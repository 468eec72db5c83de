"""The forward TPU kernel: an online softmax over the blocks of keys that a block of queries may see."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.compat import output_like
from kernels.flash_attention.pallas_scores import (
    FLOOR,
    LOG2_E,
    Block,
    Position,
    kept,
    scores,
    spec,
    step_scalars,
    unseen,
)
from kernels.flash_attention.pallas_tables import DIAGONAL, FIRST, FULL, LAST, Schedule


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    elements: dict[str, tuple[jax.Array, pl.BlockSpec]],
    numbers: jax.Array,
    table: Schedule,
    position: Position,
    block: Block,
    options: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    """q [batch, heads, q_len, head_dim], scaled, and k alike, v [batch, kv_heads, head_dim, kv_len], whole blocks.

    Gives the result transposed [batch, heads, head_dim, q_len] and the log-sum-exp [batch, heads, 1, q_len].
    """
    batch, heads, q_len, head_dim = q.shape
    group = heads // k.shape[1]
    inputs = {
        "q": (q, spec((None, None, block.q, head_dim), position, lambda b, h, i, j: (b, h, i, 0))),
        "k": (k, spec((None, None, block.kv, head_dim), position, lambda b, h, i, j: (b, h // group, j, 0))),
        "v": (v, spec((None, None, head_dim, block.kv), position, lambda b, h, i, j: (b, h // group, 0, j))),
        **elements,
    }
    out_specs = [
        spec((None, None, head_dim, block.q), position, lambda b, h, i, j: (b, h, 0, i)),
        spec((None, None, 1, block.q), position, lambda b, h, i, j: (b, h, 0, i)),
    ]
    kernel = functools.partial(_kernel, names=tuple(inputs), table=table, block=block)
    return pl.pallas_call(
        kernel,
        name="flash_attention_fwd",
        out_shape=[
            output_like(q, (batch, heads, head_dim, q_len), q.dtype),
            output_like(q, (batch, heads, 1, q_len), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, table.steps),
            in_specs=[it[1] for it in inputs.values()],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((1, block.q), jnp.float32),
                pltpu.VMEM((1, block.q), jnp.float32),
                pltpu.VMEM((head_dim, block.q), jnp.float32),
            ],
        ),
        **options,
    )(table.words, numbers, *(it[0] for it in inputs.values()))


def _kernel(words, numbers, *rest, names, table, block):
    refs = dict(zip(names, rest, strict=False))
    out, lse, top_ref, total_ref, sum_ref = rest[len(names) :]
    batch = pl.program_id(0)
    word = table.word(words, batch, pl.program_id(2))
    scalars = step_scalars(block, numbers, batch, word)

    @pl.when(word & FIRST != 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, FLOOR)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def weigh(part, values, kind):
        """The weights of a part's values, and what the sums so far are to be multiplied with."""
        queries = part.queries.slice
        if kind != FULL:
            values = unseen(block, values, refs, scalars, part, kind == DIAGONAL)
        top = top_ref[:, queries]
        new_top = jnp.maximum(top, jnp.max(values, axis=0, keepdims=True))
        weights, rescale = jnp.exp2(values - new_top), jnp.exp2(top - new_top)
        total_ref[:, queries] = total_ref[:, queries] * rescale + jnp.sum(weights, axis=0, keepdims=True)
        top_ref[:, queries] = new_top
        if "row_words" in refs:
            weights = jnp.where(kept(block, refs, part), weights, 0.0)
        return weights.astype(block.compute), rescale

    def add(part, weights, rescale):
        queries = part.queries.slice
        values = block.dot(refs["v"][:, part.keys.slice], weights)
        sum_ref[:, queries] = sum_ref[:, queries] * rescale + values

    def attend(kind):
        # The compiler overlaps what stands together: the products of the next part, the exponentials of this one and
        # the sums of the last one use different units. In the order of their definition they would wait.
        parts = block.parts(kind == DIAGONAL)
        weighed = []
        products = of_part(parts[0])
        for index, part in enumerate(parts):
            following = of_part(parts[index + 1]) if index + 1 < len(parts) else None
            if weighed:
                add(parts[index - 1], *weighed.pop())
            weighed.append(weigh(part, products, kind))
            products = following
        add(parts[-1], *weighed.pop())

    def of_part(part):
        return scores(block, refs["q"][part.queries.slice, :], refs["k"][part.keys.slice, :])[0]

    for kind in table.kinds:
        pl.when(word & kind != 0)(functools.partial(attend, kind))

    @pl.when(word & LAST != 0)
    def _():
        total = total_ref[...]
        nonzero = jnp.where(total > 0, total, 1.0)
        share = 1 / (1 - block.settings.dropout_rate)
        out[...] = (sum_ref[...] * (share / nonzero)).astype(out.dtype)
        lse[...] = jnp.where(total > 0, top_ref[...] * (1 / LOG2_E) + jnp.log(nonzero), -jnp.inf)
