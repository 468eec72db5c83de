"""Numbers in 8 bits with a scale for every block of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from kernels.gemm.formats import Format, format_of

Block = tuple[int, int] | None
"""Rows and columns that share a scale; None: all of them. Blocks at the edges may be smaller."""

# The scale of a block must have a reciprocal, and hardware takes f32's denormals for zero.
_TINY = float(jnp.finfo(jnp.float32).tiny)


class Quantized(NamedTuple):
    """A matrix in 8 bits: values times scales."""

    values: Shaped[Array, "*stack rows columns"]
    scales: Float[Array, "*stack row_blocks column_blocks"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what was rounded."""
        return self.values.shape


class Losses(NamedTuple):
    """How many numbers a format could not hold."""

    saturated: Int[Array, ""]
    """Cut down to the largest one: none unless the scales were given."""
    underflown: Int[Array, ""]
    """Not zero, and zero in the format."""


def quantize(
    x: Float[Array, "rows columns"],
    dtype: DTypeLike,
    block: Block = None,
    *,
    scales: Float[Array, "row_blocks column_blocks"] | None = None,
) -> Quantized:
    """Round a matrix to 8 bits, to nearest and ties to even, with one scale a block.

    values = round(x / scales), where a block's scale is its largest |x| over the format's largest number, for floats
    rounded up to a power of two. `block` is (1, 128) for activations that are contracted along their columns and
    (128, 128) for weights (DeepSeek-V3, arXiv 2412.19437); None is one scale for the tensor. With `scales`, those of an
    earlier step say, numbers beyond them saturate.

    |values scales - x| <= max(relative |x|, scales step / 2) with the format's `relative` and `step`, for numbers
    that do not saturate, unless a value rounds up beyond f32's largest. One outlier of 1e4 in a block costs the
    smaller numbers: those up to 0.03 become zero in e4m3, those up to 39 in int8.

    A block of zeros has scale 1, as has one with nothing above f32's denormals, which count as zero. A block with an
    infinity or a NaN, given a scale or not, gets the scale NaN: all that is computed of it is NaN in every format, and
    whoever guards the step sees it.

    **Raises** ValueError for a type that is no 8-bit format, and scales whose shape is not that of the blocks.
    """
    it, largest = format_of(dtype), block_maxima(x, block)
    if scales is None:
        used = scales_of(largest, dtype)
    else:
        _check_scales(scales, largest)
        used = jnp.where(jnp.isfinite(largest), scales, jnp.nan)
    # What is multiplied by NaN in the end may be anything here: where scales are given, rounding waits for no maximum.
    if scales is None and it.power_of_two:
        scaled = times_powers(x, 1 / jnp.where(jnp.isnan(used), 1.0, used), block)
    else:
        scaled = x.astype(jnp.float32) / spread(used if scales is None else scales, x.shape, block)
    return Quantized(_rounded(scaled, it), used)


def dequantize(
    quantized: Quantized, block: Block = None, dtype: DTypeLike = jnp.float32
) -> Float[Array, "rows columns"]:
    """values scales, multiplied in f32. In bf16 that is exact where the scales are powers of two."""
    values, scales = quantized
    return (values.astype(jnp.float32) * spread(scales, values.shape, block)).astype(dtype)


def widen(quantized: Quantized, block: Block, dtype: DTypeLike) -> Float[Array, "rows columns"]:
    """`dequantize` of a format whose scales are powers of two: faster on TPUs, but a NaN reaches all of its row."""
    return times_powers(quantized.values, quantized.scales, block).astype(dtype)


def block_maxima(x: Float[Array, "rows columns"], block: Block) -> Float[Array, "row_blocks column_blocks"]:
    """The largest |x| of each block, in f32; NaN where the block has one. What a history of maxima is made of."""

    # In x's type until they are few: XLA would store what several slices read.
    def largest(part: jax.Array, axis: int | None) -> jax.Array:
        return jnp.max(jnp.abs(part), axis=axis, initial=0.0).astype(jnp.float32)

    if block is None:
        return largest(x, None).reshape(1, 1)
    (rows, columns), (high, wide) = x.shape, block
    if high > 1:
        padded = jnp.pad(x, ((0, -rows % high), (0, 0)))
        x = largest(padded.reshape(padded.shape[0] // high, high, columns), 1)
    if wide == 1 or columns == 0:
        return jnp.abs(x).astype(jnp.float32)
    # Slice by slice: for a reduction of blocks along the lanes XLA lays all of x out anew on TPUs, in f32.
    return jnp.stack([largest(x[:, start : start + wide], 1) for start in range(0, columns, wide)], axis=1)


def scales_of(largest: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """The scales with which numbers up to `largest` fit the format: NaN for what is not finite, 1 for zeros."""
    it = format_of(dtype)
    scales = largest.astype(jnp.float32) / it.largest
    if it.power_of_two:
        # Up to the next power of two: a carry out of any digit behind the leading one adds one to the exponent.
        bits = lax.bitcast_convert_type(scales, jnp.int32)
        scales = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    scales = jnp.where(largest < _TINY, 1.0, jnp.maximum(scales, _TINY))
    return jnp.where(jnp.isfinite(largest), scales, jnp.nan)


def losses(x: Float[Array, "rows columns"], quantized: Quantized, block: Block = None) -> Losses:
    """Count what was lost of x when it was quantised in these blocks, those with scale NaN left out."""
    it = format_of(quantized.values.dtype)
    x, scales = x.astype(jnp.float32), spread(quantized.scales, x.shape, block)
    beyond = jnp.abs(x) >= it.overflow * scales
    gone = (x != 0) & (quantized.values.astype(jnp.float32) == 0) & jnp.isfinite(scales)
    return Losses(jnp.sum(beyond, dtype=jnp.int32), jnp.sum(gone, dtype=jnp.int32))


def spread(
    scales: Float[Array, "row_blocks column_blocks"], shape: tuple[int, int], block: Block
) -> Float[Array, "rows columns"]:
    """Each block's scale for every number of it."""
    for axis, side in enumerate(block or ()):
        scales = jnp.repeat(scales, side, axis) if scales.shape[axis] != 1 else scales
    return jnp.broadcast_to(scales[: shape[0], : shape[1]], shape)


def times_powers(
    x: Shaped[Array, "rows columns"], scales: Float[Array, "row_blocks column_blocks"], block: Block
) -> Float[Array, "rows columns"]:
    """x, of any type, times scales that are powers of two, in f32 and exact; a NaN of them reaches all of its row.

    What `spread` repeats XLA lays out anew on TPUs, in f32. Along the columns a product with ones does it in one pass
    of bf16, which is fused with this one, and along whole blocks of rows another shape.
    """
    (rows, columns), (high, wide) = x.shape, block or x.shape
    if 1 not in (wide, scales.shape[1]):
        own = jnp.arange(columns) // wide == jnp.arange(scales.shape[1])[:, None]
        ones = own.astype(jnp.bfloat16)
        scales = lax.dot(scales.astype(jnp.bfloat16), ones, preferred_element_type=jnp.float32)
    if high > 1 and len(scales) > 1:
        if rows % high:
            return x.astype(jnp.float32) * jnp.repeat(scales, high, axis=0)[:rows]
        parts = x.reshape(-1, high, columns).astype(jnp.float32) * scales[:, None, :]
        return parts.reshape(rows, columns)
    return x.astype(jnp.float32) * scales


def _rounded(scaled: jax.Array, it: Format) -> jax.Array:
    # Beyond its largest number a float of 8 bits has NaN or infinity, whatever the type that is rounded.
    inside = jnp.clip(scaled, -it.largest, it.largest)
    if it.relative == 0:
        inside = jnp.where(jnp.isnan(inside), 0.0, jnp.round(inside))
    return inside.astype(it.dtype)


def _check_scales(scales, largest):
    if scales.shape != largest.shape:
        raise ValueError(
            f"quantize: scales has shape {list(scales.shape)}, expected {list(largest.shape)}, one a block; "
            "pass the block that they were made for"
        )
