"""Dispatch and combine as gathers, forward and backward: a scatter of rows is slow everywhere."""

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.compat import accumulator, vary_alike
from kernels.moe_dispatch.plan import DispatchPlan, owns_row, token_of_row


def dispatch(x: Float[Array, "tokens d_model"], plan: DispatchPlan) -> Float[Array, "padded_rows d_model"]:
    """Copy each token to the row of each of its choices."""
    return _dispatch(*vary_alike((x, plan)))


def combine(
    rows: Float[Array, "padded_rows d_model"], plan: DispatchPlan, weights: Float[Array, "tokens choices"]
) -> Float[Array, "tokens d_model"]:
    """Sum each token's rows with their weights."""
    return _combine(*vary_alike((rows, plan, weights)))


@jax.custom_vjp
def _dispatch(x, plan):
    return _rows_of_tokens(x, plan)


def _dispatch_forward(x, plan):
    return _rows_of_tokens(x, plan), plan


def _dispatch_backward(plan, g):
    return reduce(add, (_choice(g, plan, c) for c in range(plan.position.shape[1]))).astype(g.dtype), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(rows, plan, weights):
    # One gather a choice, summed element by element: as one gather and a reduction it is 6 times slower on CPU.
    wide = accumulator(rows.dtype)
    parts = (_choice(rows, plan, c) * weights[:, c, None].astype(wide) for c in range(weights.shape[1]))
    return reduce(add, parts).astype(rows.dtype)


def _combine_forward(rows, plan, weights):
    return _combine(rows, plan, weights), (rows, plan, weights)


def _combine_backward(saved, g):
    rows, plan, weights = saved
    wide = accumulator(rows.dtype)
    weight = _take(weights.reshape(-1), jnp.minimum(plan.source, weights.size - 1)).astype(wide)
    d_rows = (_rows_of_tokens(g, plan).astype(wide) * weight[:, None]).astype(rows.dtype)
    products = (jnp.sum(_choice(rows, plan, c) * g.astype(wide), axis=-1) for c in range(weights.shape[1]))
    return d_rows, None, jnp.stack(list(products), axis=1).astype(weights.dtype)


_combine.defvjp(_combine_forward, _combine_backward)


def _choice(rows, plan, c):
    """The row of each token's choice c, to accumulate."""
    return _take(rows, plan.position[:, c]).astype(accumulator(rows.dtype))


def _rows_of_tokens(x, plan):
    return jnp.where(owns_row(plan)[:, None], _take(x, token_of_row(plan)), 0)


def _take(x, index):
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
