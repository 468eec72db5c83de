"""How a layer's tokens bear on each other, held beside the teacher's (2012.15828).

Queries, keys and values of a layer are each cut into as many relation heads in both models, whatever heads they have:

    R = softmax(A Aᵀ / sqrt(width of a relation head))  over a token and those before it in its document

and the student's R is to be the teacher's. Where the teacher's tokens end there is a row and a column.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vishwamai_eqx.architecture import Model
from vishwamai_eqx.layers import wide
from vishwamai_eqx.mesh import gather, size, sum_over, vary
from vishwamai_eqx.model import VishwamAI, without_layers

# Of what is never seen; less, and its exponential is zero all the same.
UNSEEN = -1e30


def divergence(
    mine: list[Float[Array, "batch seq _"]],
    theirs: list[Float[Array, "batch seq _"]],
    segment_ids: Int[Array, "batch seq"],
    known: Bool[Array, "batch seq"],
    heads: int,
) -> Float[Array, ""]:
    """The sum over known tokens of the divergence of R from the teacher's, on average over relation heads and kinds.

    A row of the batch at a time, computed again on the way back: never are the relations of all held. `heads` are all
    of them, of which each device along the mesh's `model` has its part of both models'.
    """
    own = heads // size("model")

    def row(operands: Any) -> Array:
        mine, theirs, segments, known = operands
        order = jnp.arange(len(known))
        visible = (segments[:, None] == segments) & known & (order <= order[:, None])
        total = jnp.zeros((), wide(mine[0].dtype))
        for a, b in zip(mine, theirs, strict=True):
            q, p = relation(a, visible, own), jax.lax.stop_gradient(relation(b, visible, own))
            total += jnp.sum((jnp.exp(p) * (p - q)).sum(axis=-1) * known)
        return total / (heads * len(mine))

    return sum_over(jax.lax.map(jax.checkpoint(row), (mine, theirs, segment_ids, known)).sum(), "model")


def relation(
    x: Float[Array, "seq width"], visible: Bool[Array, "seq seq"], heads: int
) -> Float[Array, "{heads} seq seq"]:
    """Logarithms of R."""
    x = x.reshape(len(x), heads, -1)
    scores = jnp.einsum("qhw,khw->hqk", x, x, preferred_element_type=wide(x.dtype)) / math.sqrt(x.shape[-1])
    return jax.nn.log_softmax(jnp.where(visible, scores, UNSEEN), axis=-1)


def projected(
    model: Model, placement: Any, layer: int, before: Float[Array, "batch seq d_model"]
) -> list[Float[Array, "batch seq _"]]:
    """Queries, keys and values of a layer, counted from 1, before they are normed and turned; `before` is its input."""
    index = layer - 1
    if isinstance(model, VishwamAI):
        stack, place = model.blocks, placement and placement.blocks
    else:
        period = len(model.period)
        repeats = model.config.num_hidden_layers // period
        if index < repeats * period:
            stack, place = model.period[index % period], placement and placement.period[index % period]
            index //= period
        else:
            rest = index - repeats * period
            stack, place, index = model.rest[rest], placement and placement.rest[rest], 0
    parts, places = (stack.attention_norm, stack.attention), place and (place.attention_norm, place.attention)
    shards = jax.tree.map(lambda leaf: leaf[index], parts)
    norm, attention = gather(shards, places and jax.tree.map(without_layers, places), jnp.dtype(model.compute_dtype))
    x = vary(norm(before), "model")
    return [attention.query(x), attention.key(x), attention.value(x)]
