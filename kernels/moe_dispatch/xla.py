"""Dispatch and combine as gathers, forward and backward: a scatter of rows is slow everywhere."""

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
    # A token's gradient is the sum over its choices: the rows are known, so this gathers.
    return jnp.sum(g[plan.position].astype(accumulator(g.dtype)), axis=1).astype(g.dtype), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(rows, plan, weights):
    wide = accumulator(rows.dtype)
    chosen = rows[plan.position].astype(wide)
    return jnp.sum(chosen * weights.astype(wide)[..., None], axis=1).astype(rows.dtype)


def _combine_forward(rows, plan, weights):
    return _combine(rows, plan, weights), (rows, plan, weights)


def _combine_backward(saved, g):
    rows, plan, weights = saved
    wide = accumulator(rows.dtype)
    weight = weights.reshape(-1)[jnp.minimum(plan.source, weights.size - 1)].astype(wide)
    d_rows = (_rows_of_tokens(g, plan).astype(wide) * weight[:, None]).astype(rows.dtype)
    chosen = rows[plan.position].astype(wide)
    d_weights = jnp.sum(chosen * g[:, None, :].astype(wide), axis=-1).astype(weights.dtype)
    return d_rows, None, d_weights


_combine.defvjp(_combine_forward, _combine_backward)


def _rows_of_tokens(x, plan):
    return jnp.where(owns_row(plan)[:, None], x[token_of_row(plan)], 0)
