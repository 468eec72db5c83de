"""What the kernels need of JAX itself: accumulation types and manual mesh axes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

Dimensions = tuple[Sequence[int], Sequence[int]]


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """The type that products of `dtype` accumulate in: f64 for f64, else f32."""
    return jnp.promote_types(dtype, jnp.float32)


def narrow_dot(a: jax.Array, b: jax.Array, contract: Dimensions, batch: Dimensions = ((), ())) -> jax.Array:
    """`lax.dot_general` with a result in a's type, accumulated in f32, in the form that is fast on CPU."""
    # Before 0.12 XLA's CPU library has no bf16 result and computes all of such a product in f32, 2.6 times slower.
    wide = accumulator(a.dtype) if jax.__version_info__ < (0, 12) else None
    return lax.dot_general(a, b, (contract, batch), preferred_element_type=wide).astype(a.dtype)


def vary_alike(tree: Any) -> Any:
    """Make every array of a pytree vary over the union of the manual mesh axes that any of them varies over.

    A `custom_vjp` must return cotangents with the types of its inputs. With equal inputs that holds by itself, and the
    sum over devices that a replicated input's gradient needs is the transpose of the cast made here.
    """
    axes = frozenset[str]().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(tree)))

    def vary(leaf: ArrayLike) -> ArrayLike:
        missing = axes - varying_axes(leaf)
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def zeros_varying_like(shape: Sequence[int], dtype: DTypeLike, like: jax.Array) -> jax.Array:
    """Zeros that vary over the manual mesh axes of `like`, as the carry of a loop must."""
    zeros = jnp.zeros(shape, dtype)
    axes = varying_axes(like)
    return lax.pcast(zeros, tuple(sorted(axes)), to="varying") if axes else zeros


def output_like(like: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """What a Pallas kernel writes, varying over the manual mesh axes of `like`."""
    axes = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=axes)


def known(x: ArrayLike) -> np.ndarray | None:
    """The values of an array that is not being traced and lies on this host; None for any other."""
    if isinstance(x, Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)


def varying_axes(leaf: ArrayLike) -> frozenset[str]:
    return jax.typeof(leaf).manual_axis_type.varying
