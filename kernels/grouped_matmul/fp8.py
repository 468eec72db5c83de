"""The grouped product that trains in fp8: rows and weights in e4m3, gradients in e5m2, as in `kernels.gemm.fp8`.

The grouped kernels multiply bf16, which holds scaled fp8 exactly: fp8 saves bytes here, in what is kept for the
backward pass and what is gathered, and no cycle.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from kernels.compat import vary_alike
from kernels.gemm.fp8 import Fp8, fp8_activations, fp8_gradient, fp8_weights, side
from kernels.gemm.quantize import Block, Quantized, widen
from kernels.grouped_matmul.api import grouped_matmul


@dataclass(frozen=True)
class _Settings:
    """What is static in a call."""

    block_size: int | None
    dtype: Any
    """Of the rows, and so of the result."""
    rhs_dtype: Any
    options: tuple[tuple[str, Any], ...]

    @property
    def row(self) -> Block:
        """Numbers of a row that share a scale."""
        return side(self.block_size, 0, 1)

    def multiply(self, x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """The product of what is widened."""
        return grouped_matmul(x, w, group_sizes, **dict(self.options))

    def wide(self, x: Quantized, w: Quantized) -> tuple[jax.Array, jax.Array]:
        """Both in the type of the results, in which each number is what it is in fp8."""
        one = functools.partial(widen, block=side(self.block_size, 1, 1), dtype=self.dtype)
        return widen(x, self.row, self.dtype), jax.vmap(one)(w)


def fp8_grouped_matmul(
    lhs: Float[Array, "rows k"] | Fp8,
    rhs: Float[Array, "groups _ _"] | Fp8,
    group_sizes: Int[Array, " groups"],
    *,
    block_size: int | None = 128,
    **options: Any,
) -> Float[Array, "rows n"]:
    """`grouped_matmul` of what is rounded to fp8, unless it is already, in lhs's type; `options` are the same.

    **Raises** ValueError as `grouped_matmul` does.
    """
    meters = rhs.meters if isinstance(rhs, Fp8) else None
    block_size = None if meters else block_size
    lhs, rhs = fp8_activations(lhs, block_size, meters), fp8_weights(rhs, block_size)
    # bf16 and f32 hold scaled fp8; what is narrower is no type of activations.
    settings = _Settings(block_size, lhs.dtype, rhs.dtype, tuple(options.items()))
    lhs, rhs, group_sizes = vary_alike((lhs, rhs._replace(meters=None), group_sizes))
    with jax.named_scope("fp8_grouped_matmul"):
        return _product(lhs, rhs, group_sizes, meters and meters.gradients, settings)


def _value(x, w, group_sizes, meter, settings) -> jax.Array:
    return settings.multiply(*settings.wide(Quantized(*x[:2]), Quantized(*w[:2])), group_sizes)


_product = jax.custom_vjp(_value, nondiff_argnums=(4,))


def _forward(x, w, group_sizes, meter, settings):
    return _value(x, w, group_sizes, meter, settings), (Quantized(*x[:2]), Quantized(*w[:2]), group_sizes, meter)


def _backward(settings, saved, g):
    x, w, group_sizes, meter = saved
    _, pull = jax.vjp(lambda x, w: settings.multiply(x, w, group_sizes), *settings.wide(x, w))
    rounded, seen = fp8_gradient(g, settings.row, meter)
    dx, dw = pull(widen(rounded, settings.row, g.dtype))
    dw = dw.astype(settings.rhs_dtype)
    return Fp8(None, None, dx), Fp8(None, None, dw), None, seen  # pyright: ignore[reportArgumentType]


_product.defvjp(_forward, _backward)
