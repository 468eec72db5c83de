"""One scale for a whole tensor, wherever its numbers lie, and what was seen of it when it was rounded.

A scale of the numbers at hand has to wait for the largest of them on all devices. One made of the largest numbers of
earlier steps is there before they are (delayed scaling, arXiv 2209.05433 and Transformer Engine); what is beyond it
saturates. Where there are no earlier steps yet, the numbers at hand decide.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels.compat import varying_axes
from kernels.gemm.quantize import Quantized, losses, quantize, scales_of

SEEN = "fp8_seen"
"""The name under which a remat policy finds what was seen: to see it again, all before it would be computed anew."""


class Meter(NamedTuple):
    """How a tensor is rounded; and as its gradient, which is none, what was seen of the tensor on all devices."""

    scale: Float[Array, "*stack"] | None
    """To round with, a power of two; 0: there is none yet; None: always that of the numbers at hand. What flows back
    is the largest |x| there was."""
    saturated: Float[Array, "*stack"]
    """0. What flows back is the share of the numbers that were cut down to the format's largest."""
    underflown: Float[Array, "*stack"]
    """0. What flows back is the share of those that are zero in the format, and were not."""


class Meters(NamedTuple):
    """Of a weight, of what goes into its products, and of their results' gradients."""

    weights: Meter
    inputs: Meter
    gradients: Meter


def metered(x: Float[Array, "*stack rows columns"], dtype: DTypeLike, meter: Meter) -> tuple[Quantized, Meter]:
    """x rounded with one scale, and what was seen; within `shard_map` over all devices that x varies over."""
    axes = tuple(sorted(varying_axes(x)))
    here = jnp.max(jnp.abs(x), initial=0.0).astype(jnp.float32)

    def largest() -> jax.Array:
        return lax.pmax(here, axes) if axes else here

    if meter.scale is None:
        scale, seen = scales_of(largest(), dtype), None
    else:
        given, seen = meter.scale, largest()
        # Not `where`, which would wait for the numbers at hand at every step.
        scale = lax.cond(given > 0, lambda: given, lambda: scales_of(largest(), dtype))

    def rounded(matrix: jax.Array) -> tuple[Quantized, jax.Array]:
        found = quantize(matrix, dtype, scales=scale[None, None])
        return found, jnp.stack(losses(matrix, found)).astype(jnp.float32)

    for _ in x.shape[2:]:
        rounded = jax.vmap(rounded)
    found, lost = rounded(x)
    shares = lost.reshape(-1, 2).sum(axis=0) / max(x.size, 1)
    # Every device has as many numbers as the others, and copies change no mean.
    saturated, underflown = lax.pmean(shares, axes) if axes else shares
    return found, checkpoint_name(Meter(seen, saturated, underflown), SEEN)
