"""The product with gradients in the forms that XLA's CPU library runs fast.

Measured on two cores with AMX, 4096 rows: in bf16 the gradient of w as autodiff has it (a TN product) is 2 to 4 times
slower than contracting two dimensions, of which XLA makes a transposed copy and an NN product; in f32 TN is the faster.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from kernels.compat import accumulator, narrow_dot, vary_alike
from kernels.gemm.formats import INT8
from kernels.gemm.quantize import Quantized, dequantize
from kernels.gemm.scales import Scaling, of_w, of_x


def gemm(x: Float[Array, "*batch k"], w: Float[Array, "..."], transposed: bool) -> Float[Array, "*batch n"]:
    """x @ w, or x @ w.T if transposed."""
    *batch, k = x.shape
    rows = x.reshape(batch[0], -1, k) if len(batch) > 1 else x.reshape(1, -1, k)
    rows, w = vary_alike((rows, w))
    return _product(rows, w, transposed).reshape(*batch, -1)


def _value(x, w, transposed) -> jax.Array:
    return narrow_dot(x, w.astype(x.dtype), ((2,), (1 if transposed else 0,)))


_product = jax.custom_vjp(_value, nondiff_argnums=(2,))


def _forward(x, w, transposed):
    return _value(x, w, transposed), (x, w)


def _backward(transposed, saved, g):
    x, w = saved
    dx = narrow_dot(g, w.astype(x.dtype), ((2,), (0 if transposed else 1,)))
    first, second = (g, x) if transposed else (x, g)
    if x.dtype.itemsize > 2:
        first, second = (side.reshape(-1, side.shape[2]) for side in (first, second))
    rows = tuple(range(first.ndim - 1))
    dw = lax.dot_general(first, second, ((rows, rows), ((), ())), preferred_element_type=accumulator(x.dtype))
    return dx, lax.optimization_barrier(dw).astype(w.dtype)


_product.defvjp(_forward, _backward)


def scaled_matmul(
    x: Shaped[Array, "rows k"],
    w: Shaped[Array, "..."],
    x_scales: Float[Array, "..."] | None,
    w_scales: Float[Array, "..."],
    scaling: Scaling,
) -> Float[Array, "rows n"]:
    """(x x_scales) @ (w w_scales).

    Scales that are the same along k scale the result of the 8-bit product, for which the backend may have an
    instruction; others the operands, in bf16, which holds scaled fp8 exactly, or in f32, which scaled int8 needs.
    """
    x, w, x_scales, w_scales = vary_alike((x, w, x_scales, w_scales))
    contract = ((1,), (1 if scaling.transposed else 0,)), ((), ())
    if scaling.depth >= scaling.k:
        integers = x.dtype == w.dtype == INT8
        w = w if x_scales is not None else w.astype(x.dtype)
        wide = jnp.int32 if integers else jnp.float32
        y = lax.dot_general(x, w, contract, precision="highest", preferred_element_type=wide).astype(jnp.float32)
        y = y * of_w(w_scales, scaling)
        return (y if x_scales is None else y * of_x(x_scales, scaling).T).astype(scaling.dtype)
    exact = jnp.float32 if jnp.float32 in (x.dtype, w.dtype) or w.dtype == INT8 else jnp.bfloat16
    w = dequantize(Quantized(w, w_scales), scaling.w_block, exact)
    x = x.astype(exact) if x_scales is None else dequantize(Quantized(x, x_scales), scaling.x_block, exact)
    return lax.dot_general(x, w, contract, precision="highest", preferred_element_type=jnp.float32).astype(
        scaling.dtype
    )
