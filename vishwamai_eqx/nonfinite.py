"""Where in a step numbers stopped being finite: which layer's output, or which layer's gradient, was the first."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kernels.compat import vary_alike
from vishwamai_eqx.config import AXES
from vishwamai_eqx.mesh import sum_over, vary


class Broken(eqx.Module):
    """Where numbers were not finite, in the order of the forward pass: 0 where all were."""

    outputs: Int[Array, "blocks"]
    """Of the embedding and of each layer."""
    gradients: Int[Array, "parts"]
    """Of the embedding's, each layer's and the final norm's and head's parameters."""


def devices(flags: Bool[Array, "*shape"]) -> Int[Array, "*shape"]:
    """On how many devices each flag is up; within `shard_map`."""
    return sum_over(vary(flags.astype(jnp.int32), *AXES), *AXES)


def tap(x: Float[Array, "*shape"], probe: Float[Array, ""]) -> Float[Array, "*shape"]:
    """x, unchanged; the gradient with respect to `probe` is 1 if x was not finite, and else 0; within `shard_map`.

    So what the forward pass sees at a layer leaves with the gradients, summed over microbatches and devices like them.
    """
    return _tap(*vary_alike((x, probe)))


@jax.custom_vjp
def _tap(x: Array, probe: Array) -> Array:
    return x


# Kept under this name by every remat policy: to make it again, all of a layer would be computed anew to its last sum.
TAP = "tap"
_tap.defvjp(
    lambda x, probe: (x, checkpoint_name((~jnp.isfinite(x).all()).astype(probe.dtype), TAP)),
    lambda broken, gradient: (gradient, broken),
)


def broken(outputs: Float[Array, "blocks"], squares: Any) -> Broken:
    """Where numbers are not finite, given the gradients of the probes and `optim.squares` of the model's."""

    def parts(tree: Any) -> Array:
        return jnp.stack([~jnp.isfinite(leaf) for leaf in jax.tree.leaves(tree)]).any(axis=0)

    flags = [
        parts(squares.embedding)[None],
        squares.by_layer([parts(stack) for stack in squares.stacks]),
        parts((squares.norm, squares.untied_head))[None],
    ]
    return Broken(outputs.astype(jnp.int32), devices(jnp.concatenate(flags)))


def first(broken: Broken, loss: float) -> str | None:
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
