"""A model on one CPU whose layers are also arrays of their own, for the steps of generation.

XLA copies a layer out of its stack before it multiplies with it. Beside the products of many tokens that is nothing;
beside those of one it is twice the work again. The arrays are views of the stacks: they take no memory.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vishwamai_eqx.architecture import Model

# Fewer tokens a row than a piece of a prompt ever has.
FEW = 16


class Apart(eqx.Module):
    """The same model: called as it is, with the same results."""

    model: Model
    layers: list[list[Array]]
    """Of each array of the stacks its layers."""
    places: tuple[int, ...] = eqx.field(static=True)
    """Where in the tree those are."""

    def __call__(
        self, tokens: Int[Array, "batch seq"], *, segment_ids: Any = None, cache: Any = None, placement: Any = None
    ) -> Any:
        model, few = self.model, tokens.shape[1] < FEW
        if few:
            # Taken apart again where they are unrolled, so nothing is stacked.
            leaves, structure = jax.tree.flatten(model)
            for place, layers in zip(self.places, self.layers, strict=True):
                leaves[place] = jnp.stack(layers)
            model = jax.tree.unflatten(structure, leaves)
        return model(tokens, segment_ids=segment_ids, cache=cache, unroll=few)

    @property
    def head_weight(self) -> Any:
        return self.model.head_weight

    def head(self, hidden: Float[Array, "*batch d_model"], placement: Any = None) -> Float[Array, "*batch vocab"]:
        return self.model.head(hidden)

    def new_cache(self, batch: int, length: int, slack: int = 0) -> Any:
        return self.model.new_cache(batch, length, slack)


def apart(model: Model) -> Model | Apart:
    """The model as it is fastest to write with: apart where all of it is on one CPU, else as it is."""
    leaves = jax.tree.leaves(model)
    devices = leaves[0].devices()
    if len(devices) > 1 or next(iter(devices)).platform != "cpu":
        return model
    stacked = {id(leaf) for leaf in jax.tree.leaves(model.stacks)}
    places = [place for place, leaf in enumerate(leaves) if id(leaf) in stacked]
    return Apart(model, [_views(leaves[place]) for place in places], tuple(places))


def _views(stack: Array) -> list[Array]:
    (device,) = stack.devices()
    return [jax.device_put(layer, device, may_alias=True) for layer in np.asarray(stack)]
