"""Dispatch and combine by plain indexing, in f32."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.compat import accumulator
from kernels.moe_dispatch.plan import DispatchPlan


def dispatch(x: Float[Array, "tokens d_model"], plan: DispatchPlan) -> Float[Array, "padded_rows d_model"]:
    """Copy each token to the row of each of its choices."""
    rows = jnp.zeros((plan.source.shape[0], x.shape[1]), x.dtype)
    return rows.at[plan.position].set(x[:, None, :])


def combine(
    rows: Float[Array, "padded_rows d_model"], plan: DispatchPlan, weights: Float[Array, "tokens choices"]
) -> Float[Array, "tokens d_model"]:
    """Sum each token's rows with their weights."""
    wide = accumulator(rows.dtype)
    chosen = rows[plan.position].astype(wide)
    return jnp.einsum("tcd,tc->td", chosen, weights.astype(wide), precision="highest").astype(rows.dtype)
