"""Rows of 16-bit numbers as 32-bit words, two rows to a word, for what TPUs do only, or faster, to 32 bits.

In vector memory rows 2i and 2i + 1 of a bf16 array share the words of row i: the even row is the low half.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.tpu import LANES

HIGH = 0xFFFF0000


def words(x: jax.Array) -> jax.Array:
    """The array as uint32 [rows * itemsize / 4, columns]."""
    return pltpu.bitcast(x, jnp.uint32)


def rows_between(low: int | jax.Array, high: int | jax.Array, shape: tuple[int, int], itemsize: int) -> jax.Array:
    """The words of an array of this shape with ones in the bits of the rows from low up to high."""
    packed = 4 // itemsize
    rows, columns = shape
    # 128 columns, repeated: the same registers serve them all.
    index = jax.lax.broadcasted_iota(jnp.int32, (rows // packed, LANES), 0) * packed
    keep = jnp.zeros(index.shape, jnp.uint32)
    for part in range(packed):
        inside = (index + part >= low) & (index + part < high)
        bits = (2 ** (8 * itemsize) - 1) << (8 * itemsize * part)
        keep |= jnp.where(inside, jnp.uint32(bits), jnp.uint32(0))
    return jnp.concatenate([keep] * (columns // LANES), axis=1)


def widen(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The even and the odd rows of a bf16 array in f32: a cast takes 3 times as long where bf16 is not native."""
    u = words(x)
    return pltpu.bitcast(u << 16, jnp.float32), pltpu.bitcast(u & jnp.uint32(HIGH), jnp.float32)


def narrow(even: jax.Array, odd: jax.Array) -> jax.Array:
    """The words of the bf16 array that has these rows, rounded to nearest, ties to even."""
    return (_rounded(even) >> 16) | (_rounded(odd) & jnp.uint32(HIGH))


def _rounded(x):
    u = pltpu.bitcast(x, jnp.uint32)
    # A carry out of a NaN's bits would make a number of it.
    return jnp.where(x != x, jnp.uint32(0x7FC00000), u + jnp.uint32(0x7FFF) + ((u >> 16) & jnp.uint32(1)))
