"""The plain products: that of floats differentiated by JAX, that of scaled 8-bit numbers after undoing the scales."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from kernels.gemm.quantize import Quantized, dequantize
from kernels.gemm.scales import Scaling


def gemm(x: Float[Array, "*batch k"], w: Float[Array, "..."], transposed: bool) -> Float[Array, "*batch n"]:
    """x @ w, or x @ w.T if transposed."""
    contract = ((x.ndim - 1,), (1 if transposed else 0,))
    return lax.dot_general(x, w.astype(x.dtype), (contract, ((), ())))


def scaled_matmul(
    x: Shaped[Array, "rows k"],
    w: Shaped[Array, "..."],
    x_scales: Float[Array, "..."] | None,
    w_scales: Float[Array, "..."],
    scaling: Scaling,
) -> Float[Array, "rows n"]:
    """(x x_scales) @ (w w_scales), every number scaled by itself, in f32."""
    wide_w = dequantize(Quantized(w, w_scales), scaling.w_block)
    wide_x = x.astype(jnp.float32)
    if x_scales is not None:
        wide_x = dequantize(Quantized(x, x_scales), scaling.x_block)
    return jnp.matmul(wide_x, wide_w.T if scaling.transposed else wide_w, precision="highest").astype(scaling.dtype)
