"""A product that trains in fp8: e4m3 forward, e5m2 gradients, sums in f32.

    y = Q4(x) Q4(w)        dx = Q5(g) Q4(w)ᵀ        dw = Q4(x)ᵀ Q5(g)

Q4 rounds to e4m3, which has the digits, Q5 to e5m2, which has the reach (FP8 Formats for Deep Learning, arXiv
2209.05433). The gradients are those of the product of the rounded matrices; rounding itself counts as the identity.

A block of each has its scale, or with `Meters` each whole tensor, wherever its numbers lie.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from kernels.compat import vary_alike, zeros_varying_like
from kernels.gemm.api import check_shapes, scaled_matmul
from kernels.gemm.formats import E4M3, E5M2
from kernels.gemm.meters import Meter, Meters, metered
from kernels.gemm.quantize import Block, Quantized, quantize, widen


class Fp8(NamedTuple):
    """An array in e4m3, rounded once for all the products it goes into, and the way back for its gradient."""

    values: Shaped[Array, "*stack rows columns"]
    """Activations as one matrix, whatever their shape was."""
    scales: Float[Array, "*stack row_blocks column_blocks"]
    gradient: Float[Array, "..."]
    """Zeros of the shape and type of what was rounded, which nobody reads: gradients of 8-bit numbers would have 8 bits
    too, so they flow to these."""
    meters: Meters | None = None
    """Of a weight in whose products each tensor has one scale, whatever the block size."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what was rounded."""
        return self.gradient.shape

    @property
    def dtype(self) -> Any:
        """Of what was rounded, and of results and gradients."""
        return self.gradient.dtype


def fp8_activations(
    x: Float[Array, "*batch k"] | Fp8, block_size: int | None = 128, meters: Meters | None = None
) -> Fp8:
    """x in e4m3 with a scale for every `block_size` numbers along its last axis, or one for all of it if None; what is
    rounded already, as it is. With the `meters` of the weight, one for all of it on all devices."""
    if isinstance(x, Fp8):
        return x
    return _rounded(x, meters and meters.inputs, side(None if meters else block_size, 0, 1), True)


def fp8_weights(
    w: Float[Array, "*stack rows columns"] | Fp8, block_size: int | None = 128, meters: Meters | None = None
) -> Fp8:
    """w in e4m3 with a scale for each square of `block_size` (DeepSeek-V3, arXiv 2412.19437), or one for each matrix
    if None; what is rounded already, as it is. With `meters`, one for all of it on all devices."""
    if isinstance(w, Fp8):
        return w
    rounded: Any = _rounded(w, meters and meters.weights, side(None if meters else block_size, 1, 1), False)
    return rounded._replace(meters=meters)


def side(block_size: int | None, rows: int, columns: int) -> Block:
    """A block of this shape in units of the block size, in which 0 is one number."""
    return None if block_size is None else (rows * block_size or 1, columns * block_size or 1)


def fp8_rounded(x: Float[Array, "..."], meter: Meter | None, block: Block, flat: bool) -> tuple[Fp8, Meter | None]:
    """x, if `flat` as one matrix, in e4m3 with a scale a block or as `meter` says, and what that saw; no gradient goes
    through it."""
    matrices = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if flat else x
    if meter is not None:
        found, seen = metered(matrices, E4M3, meter)
    else:
        one, seen = functools.partial(quantize, dtype=E4M3, block=block), None
        for _ in matrices.shape[2:]:
            one = jax.vmap(one)
        found = one(matrices)
    return Fp8(*found, zeros_varying_like(x.shape, x.dtype, x)), seen


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rounded(x: jax.Array, meter: Meter | None, block: Block, flat: bool) -> Fp8:
    return fp8_rounded(x, meter, block, flat)[0]


_rounded.defvjp(fp8_rounded, lambda block, flat, seen, g: (g.gradient, seen))


@dataclass(frozen=True)
class _Settings:
    """What is static in a call."""

    transposed: bool
    block_size: int | None
    x_shape: tuple[int, ...]
    dtype: Any
    """Of x, and so of the result."""
    w_dtype: Any
    implementation: str | None
    interpret: Any

    def multiply(self, a: Quantized, b: Quantized, transposed: bool, dtype: Any) -> jax.Array:
        """The product of two matrices in fp8."""
        return scaled_matmul(
            *(a.values, b.values, a.scales, b.scales),
            block_size=self.block_size or 128,
            transposed=transposed,
            dtype=dtype,
            implementation=self.implementation,
            interpret=self.interpret,
        )


def fp8_gemm(
    x: Float[Array, "*batch k"] | Fp8,
    w: Float[Array, "..."] | Fp8,
    *,
    transposed: bool = False,
    block_size: int | None = 128,
    implementation: str | None = None,
    interpret: Any = None,
) -> Float[Array, "*batch n"]:
    """`gemm` in fp8: y = x w with w [k, n], or y = x wᵀ with w [n, k] if `transposed`, in x's type.

    x and w are rounded as by `fp8_activations` and `fp8_weights` unless they are already; the gradient of y has, like
    x, a scale for every `block_size` numbers along the axis that is contracted. The gradient of w is in w's own type,
    unrounded if that is f32. Kept for the backward pass are x and w in fp8. A block with an infinity or a NaN gives
    NaN, forward and backward.

    **Raises** ValueError where w is not a matrix of x's k, and where the implementation is unknown or has no kernel for
    the block size.
    """
    check_shapes("fp8_gemm", x.shape, w.shape, transposed)
    meters = w.meters if isinstance(w, Fp8) else None
    block_size = None if meters else block_size
    settings = _Settings(transposed, block_size, x.shape, x.dtype, w.dtype, implementation, interpret)
    with jax.named_scope("fp8_gemm"):
        x, w = fp8_activations(x, block_size, meters), fp8_weights(w, block_size)
        x, w = vary_alike((x, w._replace(meters=None)))
        y = _product(x, w, meters and meters.gradients, settings)
    return y.reshape(*x.shape[:-1], y.shape[1])


def _value(x, w, meter, settings) -> jax.Array:
    return settings.multiply(Quantized(*x[:2]), Quantized(*w[:2]), settings.transposed, settings.dtype)


_product = jax.custom_vjp(_value, nondiff_argnums=(3,))


def _forward(x, w, meter, settings):
    return _value(x, w, meter, settings), (Quantized(*x[:2]), Quantized(*w[:2]), meter)


def _backward(settings, saved, g):
    x_q, w_q, meter = saved
    row, column = side(settings.block_size, 0, 1), side(settings.block_size, 1, 0)
    g_q, seen = fp8_gradient(g, row, meter)
    dx = settings.multiply(g_q, w_q, not settings.transposed, settings.dtype)
    if settings.block_size is None:
        # One scale is the same along rows and columns.
        first, second = (g_q, x_q) if settings.transposed else (x_q, g_q)
    else:
        # The gradient of w contracts rows, and so its blocks do. Those of x are scaled anew, which rounds no digit
        # again: scales are powers of two, and bf16 holds x.
        sides = (widen(x_q, row, jnp.bfloat16), E4M3), (g, E5M2)
        first, second = (quantize(*it, column) for it in (sides[::-1] if settings.transposed else sides))
    dw = settings.multiply(Quantized(first.values.T, first.scales.T), second, False, settings.w_dtype)
    return Fp8(None, None, dx.reshape(settings.x_shape)), Fp8(None, None, dw), seen  # pyright: ignore[reportArgumentType]


def fp8_gradient(g: Float[Array, "rows n"], row: Block, meter: Meter | None) -> tuple[Quantized, Meter | None]:
    """The gradient of a product's result in e5m2, and what its meter saw."""
    return (quantize(g, E5M2, row), None) if meter is None else metered(g, E5M2, meter)


_product.defvjp(_forward, _backward)
