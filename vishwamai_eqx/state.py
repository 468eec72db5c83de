"""The state of a run: what the step takes and returns, checkpoints hold and sampling reads."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from vishwamai_eqx import optim, skip
from vishwamai_eqx.config import ModelConfig
from vishwamai_eqx.mesh import place
from vishwamai_eqx.model import VishwamAI, build


class TrainState(eqx.Module):
    """Parameters, optimiser state, what their last steps were like, and how many there were.

    Keys and batches derive from the step.
    """

    model: VishwamAI
    opt_state: Any
    watch: skip.Watch
    step: Int[Array, ""]


def abstract_state(config: ModelConfig, compute_dtype: str, transform: optax.GradientTransformation) -> TrainState:
    """The state's shapes and types, nothing allocated."""
    return jax.eval_shape(lambda: _init(config, compute_dtype, transform, 0))


def placement(state: TrainState, sizes: dict[str, int], transform: optax.GradientTransformation) -> TrainState:
    """A tree like the state of the PartitionSpec of each array."""
    model = place(state.model, sizes)
    watch = jax.tree.map(lambda _: PartitionSpec(), state.watch)
    parts = (model, optim.place_state(transform, state.model, model), watch, PartitionSpec())
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(parts))


def shardings(mesh: Mesh, specs: Any) -> Any:
    """The shardings of a tree of PartitionSpecs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def initialise(
    config: ModelConfig, compute_dtype: str, transform: optax.GradientTransformation, seed: int, shardings: Any
) -> TrainState:
    """A new state, each device making its own shards; the same numbers on every mesh."""
    return jax.jit(lambda: _init(config, compute_dtype, transform, seed), out_shardings=shardings)()


def _init(config: ModelConfig, compute_dtype: str, transform: optax.GradientTransformation, seed: int) -> TrainState:
    model = build(config, compute_dtype, jax.random.key(seed))
    return TrainState(model, transform.init(model), skip.begin(), jnp.zeros((), jnp.int32))
