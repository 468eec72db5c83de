"""Drafts from what a row has already: where it says something again, it may go on as it did before."""

import jax.numpy as jnp
from jaxtyping import Array, Int

# Tokens at the end of a row that are looked for, the longest first.
LONGEST = 3


def propose(
    text: Int[Array, "batch length"], lengths: Int[Array, "batch"], drafts: int
) -> Int[Array, "batch {drafts}"]:
    """What followed the newest earlier place that ends like the row does; a copy may run into itself and repeats."""
    slots, last = jnp.arange(text.shape[1]), lengths[:, None] - 1
    # How many of a place's last tokens are the row's last, up to LONGEST.
    alike, same = jnp.zeros_like(text), jnp.ones(text.shape, bool)
    for back in range(LONGEST):
        token = jnp.take_along_axis(text, jnp.maximum(last - back, 0), axis=1)
        same &= (jnp.roll(text, back, axis=1) == token) & (slots >= back) & (slots < last)
        alike += same
    best = jnp.argmax(alike * text.shape[1] + slots, axis=1)[:, None] * (alike.max(axis=1, keepdims=True) > 0)
    period = jnp.maximum(last - best, 1)
    return jnp.take_along_axis(text, best + 1 + jnp.arange(drafts) % period, axis=1, mode="clip")
