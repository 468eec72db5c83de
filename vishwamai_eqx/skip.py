"""Steps that are not taken: a loss or a gradient that is not finite, or far beyond the last ones, changes nothing.

    within the step      `judge` decides, `choose` keeps the old state or takes the new one, `Watch` goes with the state
    beside the loop      `Skips` records what was skipped, and says when to go back and when to give up

A skipped step counts as a step all the same: its batch is behind the run, and the next step has the next one.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vishwamai_eqx.config import AXES, GuardConfig

Tree = TypeVar("Tree")

# Steps that the running means reach back over; until so many are done, only what is not finite is skipped.
WINDOW = 50


class Watch(eqx.Module):
    """What was usual until now. Part of the training state, so that a resumed run judges as it would have."""

    loss: Float[Array, ""]
    """Running mean of the loss over steps taken."""
    grad_norm: Float[Array, ""]
    taken: Int[Array, ""]
    """Steps taken."""
    skipped: Int[Array, ""]
    """Steps skipped in a row, up to the last one."""


class Broken(eqx.Module):
    """Where numbers were not finite, in the order of the forward pass."""

    outputs: Bool[Array, "blocks"]
    """Of the embedding and of each layer."""
    gradients: Bool[Array, "parts"]
    """Of the embedding's, each layer's and the final norm's and head's parameters."""


def begin() -> Watch:
    """The watch of a new run."""
    return Watch(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(
    watch: Watch, loss: Float[Array, ""], grad_norm: Float[Array, ""], config: GuardConfig
) -> tuple[Bool[Array, ""], Watch]:
    """Whether to take a step with that loss and global gradient norm, and the watch after it; within `shard_map`.

    The running means are plain ones at first and then move by 1/WINDOW of the difference; skipped steps leave them.
    """

    def spikes(value: Array, mean: Array, factor: float) -> Array:
        return (watch.taken >= WINDOW) & (value > factor * mean) if factor else jnp.zeros((), bool)

    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    bad |= spikes(loss, watch.loss, config.loss_spike) | spikes(grad_norm, watch.grad_norm, config.grad_spike)
    # All devices should see the same numbers. If one sees others, through a fault of its own, it speaks for all.
    take = ~anywhere(bad)
    count = jnp.minimum(watch.taken + 1, WINDOW)
    moved = Watch(
        watch.loss + (loss - watch.loss) / count,
        watch.grad_norm + (grad_norm - watch.grad_norm) / count,
        watch.taken + 1,
        jnp.zeros_like(watch.skipped),
    )
    return take, choose(take, moved, eqx.tree_at(lambda w: w.skipped, watch, watch.skipped + 1))


def choose(take: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    """The new tree, or the old one where the step is not taken."""
    return jax.tree.map(lambda after, before: jnp.where(take, after, before).astype(before.dtype), new, old)


def anywhere(flags: Bool[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Whether each flag is up on any device."""
    return jax.lax.psum(jax.lax.pcast(flags.astype(jnp.int32), AXES, to="varying"), AXES) > 0


@jax.custom_vjp
def tap(x: Float[Array, "..."], probe: Float[Array, ""]) -> Float[Array, "..."]:
    """x, unchanged; the gradient with respect to `probe` is 1 if x was not finite, and else 0.

    So what the forward pass sees at a layer leaves with the gradients, summed over microbatches and devices as they are.
    """
    return x


tap.defvjp(
    lambda x, probe: (x, (~jnp.isfinite(x).all()).astype(probe.dtype)),
    lambda broken, gradient: (gradient, broken),
)


def broken(outputs: Float[Array, "blocks"], gradients: Any) -> Broken:
    """Where numbers are not finite: the gradients of the probes, and those of the model."""

    def parts(tree: Any, axes: Callable[[int], tuple[int, ...]]) -> Array:
        flags = [~jnp.isfinite(leaf).all(axis=axes(leaf.ndim)) for leaf in jax.tree.leaves(tree)]
        return jnp.stack(flags).any(axis=0)

    def whole(ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim))

    flags = [
        parts(gradients.embedding, whole)[None],
        parts(gradients.blocks, lambda ndim: tuple(range(1, ndim))),
        parts((gradients.norm, gradients.untied_head), whole)[None],
    ]
    return Broken(outputs > 0, anywhere(jnp.concatenate(flags)))


def first_broken(broken: Broken, loss: float) -> str | None:
    """The first thing that was not finite, in the order it was computed: forward, the loss, then backward."""
    outputs, gradients = np.flatnonzero(broken.outputs), np.flatnonzero(broken.gradients)
    if outputs.size:
        return f"the output of {'the embedding' if outputs[0] == 0 else f'layer {outputs[0] - 1}'}"
    if not math.isfinite(loss):
        return "the loss"
    if gradients.size:
        last = gradients[-1]
        names = {0: "the embedding", len(broken.gradients) - 1: "the final norm or head"}
        return f"the gradient of {names.get(last, f'layer {last - 1}')}"
    return None
