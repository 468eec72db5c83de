"""The plain product, differentiated by JAX."""

from jax import lax
from jaxtyping import Array, Float


def gemm(x: Float[Array, "*batch k"], w: Float[Array, "..."], transposed: bool) -> Float[Array, "*batch n"]:
    """x @ w, or x @ w.T if transposed."""
    contract = ((x.ndim - 1,), (1 if transposed else 0,))
    return lax.dot_general(x, w.astype(x.dtype), (contract, ((), ())))
