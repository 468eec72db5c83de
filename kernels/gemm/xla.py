"""The product with gradients in the forms that XLA's CPU library runs fast."""

from functools import partial

import jax
from jax import lax
from jaxtyping import Array, Float

from kernels.compat import accumulator, vary_alike


def gemm(x: Float[Array, "*batch k"], w: Float[Array, "..."], transposed: bool) -> Float[Array, "*batch n"]:
    """x @ w, or x @ w.T if transposed."""
    *batch, k = x.shape
    # The gradient of w contracts two dimensions, so that it becomes a transposed copy and an NN product: the TN product
    # that autodiff makes is 4 to 5 times slower on CPU.
    rows = x.reshape(batch[0], -1, k) if len(batch) > 1 else x.reshape(1, -1, k)
    rows, w = vary_alike((rows, w))
    return _product(rows, w, transposed).reshape(*batch, -1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, w, transposed):
    return _dot(x, w.astype(x.dtype), ((2,), (1 if transposed else 0,))).astype(x.dtype)


def _forward(x, w, transposed):
    return _product(x, w, transposed), (x, w)


def _backward(transposed, saved, g):
    x, w = saved
    dx = _dot(g, w.astype(x.dtype), ((2,), (0 if transposed else 1,))).astype(x.dtype)
    first, second = (g, x) if transposed else (x, g)
    dw = _dot(first, second, ((0, 1), (0, 1))).astype(w.dtype)
    return dx, dw


_product.defvjp(_forward, _backward)


def _dot(a, b, contract):
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=accumulator(a.dtype))
