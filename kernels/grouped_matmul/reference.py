"""Every group's product for every row, then the row's own, in f32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.compat import accumulator


def grouped_matmul(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "groups ..."],
    group_sizes: Int[Array, " groups"],
    row_alignment: int,
    transposed: bool,
) -> Float[Array, "rows n"]:
    """out[r] = lhs[r] @ rhs[group of r]; zero beyond the last group."""
    del row_alignment
    wide = accumulator(lhs.dtype)
    weights = rhs.astype(lhs.dtype).astype(wide)
    weights = weights.swapaxes(1, 2) if transposed else weights
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(lhs.shape[0])[:, None]
    member = (row < ends) & (row >= ends - group_sizes)
    every = jnp.einsum("rk,gkn->grn", lhs.astype(wide), weights, precision="highest")
    return jnp.einsum("rg,grn->rn", member.astype(wide), every, precision="highest").astype(lhs.dtype)
