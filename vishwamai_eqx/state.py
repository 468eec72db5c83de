"""The state of a run: what the step takes and returns, checkpoints hold and sampling reads."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PRNGKeyArray

from vishwamai_eqx import gemma, optim, scaling, skip, teacher
from vishwamai_eqx.architecture import Model, abstract, build
from vishwamai_eqx.config import Config
from vishwamai_eqx.mesh import place
from vishwamai_eqx.projections import Projections, layer_pairs


class TrainState(eqx.Module):
    """Parameters, optimiser state, what their last steps were like, how numbers are scaled, and how many there were.

    Keys and batches derive from the step.
    """

    model: Model
    opt_state: Any
    watch: skip.Watch
    scaling: scaling.Scaling
    step: Int[Array, ""]


def abstract_state(config: Config, compute_dtype: str, transform: optax.GradientTransformation) -> TrainState:
    """The state's shapes and types, nothing allocated."""
    return jax.eval_shape(lambda: _begin(config, _build(config, compute_dtype, jax.random.key(0)), transform))


def placement(state: TrainState, sizes: dict[str, int], transform: optax.GradientTransformation) -> TrainState:
    """A tree like the state of the PartitionSpec of each array."""
    model = place(state.model, sizes)
    everywhere = jax.tree.map(lambda _: PartitionSpec(), (state.watch, state.scaling, state.step))
    parts = (model, optim.place_state(transform, state.model, model), everywhere)
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(parts))


def shardings(mesh: Mesh, specs: Any) -> Any:
    """The shardings of a tree of PartitionSpecs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def check(config: Config, state: TrainState) -> None:
    """Refuse, as `initialise` does and before anything is compiled, to fine-tune what is not there."""
    if config.init is not None:
        gemma.check(config.init, state.model)


def initialise(
    config: Config, compute_dtype: str, transform: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """A new state, each device making its own shards, or reading them of what the run fine-tunes.

    The same numbers on every mesh. Raises ValueError where the folder has not the model's arrays.
    """
    if config.init is None:
        seed = config.seed
        new = jax.jit(
            lambda: _begin(config, _build(config, compute_dtype, jax.random.key(seed)), transform),
            out_shardings=shardings,
        )
        return new()
    model = gemma.read(config.init, abstract(config, compute_dtype), np.dtype(np.float32), shardings.model)
    return jax.jit(lambda model: _begin(config, model, transform), donate_argnums=0, out_shardings=shardings)(model)


def _build(config: Config, compute_dtype: str, key: PRNGKeyArray) -> Model:
    """The model as it is trained: with what it needs to learn of a teacher's layers."""
    model = build(config, compute_dtype, key)
    if config.teacher is None:
        return model
    theirs = teacher.configuration(config.teacher).model
    pairs = layer_pairs(config.distill, config.model.num_layers, theirs.num_layers)
    if not any(config.distill.hidden):
        return model
    maps = Projections(len(pairs), config.model.hidden_size, theirs.hidden_size, key=jax.random.fold_in(key, 1))
    return eqx.tree_at(lambda model: model.projections, model, maps, is_leaf=lambda leaf: leaf is None)


def _begin(config: Config, model: Model, transform: optax.GradientTransformation) -> TrainState:
    scales = scaling.begin(model, config)
    return TrainState(model, transform.init(model), skip.begin(), scales, jnp.zeros((), jnp.int32))
