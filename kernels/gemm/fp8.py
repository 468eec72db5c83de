"""A product that trains in fp8: e4m3 forward, e5m2 gradients, sums in f32.

    y = Q4(x) Q4(w)        dx = Q5(g) Q4(w)ᵀ        dw = Q4(x)ᵀ Q5(g)

Q4 rounds to e4m3, which has the digits, Q5 to e5m2, which has the reach (FP8 Formats for Deep Learning, arXiv
2209.05433). The gradients are those of the product of the rounded matrices; rounding itself counts as the identity.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kernels.compat import vary_alike
from kernels.gemm.api import check_shapes, scaled_matmul
from kernels.gemm.formats import E4M3, E5M2
from kernels.gemm.quantize import Block, Quantized, dequantize, quantize

RESIDUALS = ("fp8_gemm_x", "fp8_gemm_w")
"""What the backward pass needs, by the names that a remat policy such as `save_only_these_names` knows: x and w in
e4m3 with their scales."""


@dataclass(frozen=True)
class _Settings:
    """What is static in a call."""

    transposed: bool
    block_size: int | None
    w_dtype: Any
    implementation: str | None
    interpret: Any

    def block(self, rows: int, columns: int) -> Block:
        """A block of this shape in units of the block size, in which 0 is one number."""
        return None if self.block_size is None else (rows * self.block_size or 1, columns * self.block_size or 1)

    def multiply(self, a: Quantized, b: Quantized, transposed: bool, dtype: Any) -> jax.Array:
        """The product of two matrices in fp8."""
        return scaled_matmul(
            a.values,
            b.values,
            a.scales,
            b.scales,
            block_size=self.block_size or 128,
            transposed=transposed,
            dtype=dtype,
            implementation=self.implementation,
            interpret=self.interpret,
        )


def fp8_gemm(
    x: Float[Array, "*batch k"],
    w: Float[Array, "..."],
    *,
    transposed: bool = False,
    block_size: int | None = 128,
    implementation: str | None = None,
    interpret: Any = None,
) -> Float[Array, "*batch n"]:
    """`gemm` in fp8: y = x w with w [k, n], or y = x wᵀ with w [n, k] if `transposed`, in x's type.

    x and the gradient of y have a scale for every `block_size` numbers along the axis that is contracted, w one for
    every square of that side (DeepSeek-V3, arXiv 2412.19437); with block_size=None each matrix has one. The gradient of
    w is in w's own type, unrounded if that is f32. Kept for the backward pass are `RESIDUALS`, in fp8. A block with an
    infinity or a NaN gives NaN, forward and backward.

    **Raises** ValueError where w is not a matrix of x's k, and where the implementation is unknown or has no kernel for
    the block size.
    """
    check_shapes("fp8_gemm", x, w, transposed)
    *batch, k = x.shape
    rows, w = vary_alike((x.reshape(math.prod(batch), k), w))
    with jax.named_scope("fp8_gemm"):
        y = _product(rows, w, _Settings(transposed, block_size, w.dtype, implementation, interpret))
    return y.reshape(*batch, y.shape[1])


def _value(x, w, settings) -> jax.Array:
    return _forward(x, w, settings)[0]


_product = jax.custom_vjp(_value, nondiff_argnums=(2,))


def _forward(x, w, settings):
    x_q = checkpoint_name(quantize(x, E4M3, settings.block(0, 1)), RESIDUALS[0])
    w_q = checkpoint_name(quantize(w, E4M3, settings.block(1, 1)), RESIDUALS[1])
    return settings.multiply(x_q, w_q, settings.transposed, x.dtype), (x_q, w_q)


def _backward(settings, saved, g):
    x_q, w_q = saved
    dx = settings.multiply(quantize(g, E5M2, settings.block(0, 1)), w_q, not settings.transposed, g.dtype)
    # The gradient of w contracts rows, and so its blocks do. Those of x are scaled anew, which rounds no digit again:
    # scales are powers of two, and bf16 holds x.
    x = dequantize(x_q, settings.block(0, 1), jnp.bfloat16)
    first, second = (x, E4M3), (g, E5M2)
    if settings.transposed:
        first, second = second, first
    dw = settings.multiply(
        quantize(first[0].T, first[1], settings.block(0, 1)),
        quantize(*second, settings.block(1, 0)),
        False,
        settings.w_dtype,
    )
    return dx, dw


_product.defvjp(_forward, _backward)
