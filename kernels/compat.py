"""What the kernels need of JAX itself: accumulation types and manual mesh axes."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

T = TypeVar("T")


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """The type that products of `dtype` accumulate in: f64 for f64, else f32."""
    return jnp.promote_types(dtype, jnp.float32)


def vary_alike(tree: T) -> T:
    """Make every array of a pytree vary over the union of the manual mesh axes that any of them varies over.

    A `custom_vjp` must return cotangents with the types of its inputs. With equal inputs that holds by itself, and the
    sum over devices that a replicated input's gradient needs is the transpose of the cast made here.
    """
    axes = frozenset[str]().union(*(_varying(leaf) for leaf in jax.tree.leaves(tree)))

    def vary(leaf: ArrayLike) -> ArrayLike:
        missing = axes - _varying(leaf)
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def zeros_varying_like(shape: Sequence[int], dtype: DTypeLike, like: jax.Array) -> jax.Array:
    """Zeros that vary over the manual mesh axes of `like`, as the carry of a loop must."""
    zeros = jnp.zeros(shape, dtype)
    axes = _varying(like)
    return lax.pcast(zeros, tuple(sorted(axes)), to="varying") if axes else zeros


def _varying(leaf: ArrayLike) -> frozenset[str]:
    return jax.typeof(leaf).manual_axis_type.varying
