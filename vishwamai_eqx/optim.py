"""AdamW as optax transforms that are element-wise, so that they run on shards; schedules; the global norm."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from vishwamai_eqx.config import OptimConfig
from vishwamai_eqx.mesh import divided
from vishwamai_eqx.parameters import Declaration, declarations


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine, or a plateau and a linear end (2404.06395), to the final share."""
    schedule = _schedule(config)
    # Of a whole number optax would make f32 even where all else is f64, whose last bit is another in another program.
    return lambda count: schedule(jnp.asarray(count, float))


def _schedule(config: OptimConfig) -> optax.Schedule:
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_share
    warmup = min(config.warmup_steps, config.steps)
    rise = optax.linear_schedule(0.0, peak, warmup)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1), config.final_learning_rate_share)
        return optax.join_schedules([rise, fall], [warmup])
    # A short run that warms up for long falls in what steps are left.
    decay = max(1, min(round(config.decay_share * config.steps), config.steps - warmup))
    start = max(config.steps - decay, warmup)
    return optax.join_schedules(
        [rise, optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)], [warmup, start]
    )


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW (1711.05101) with decay of the parameters that declare it."""
    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda tree: jax.tree.map(lambda declared: declared.decay, declarations(tree))
        ),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def place_state(transform: optax.GradientTransformation, model: Any, placement: Any) -> Any:
    """Where the optimiser's state lies: what mirrors a parameter beside it, the rest on every device."""
    state = jax.eval_shape(transform.init, model)
    return optax.tree_map_params(
        transform,
        lambda _, spec: spec,
        state,
        placement,
        transform_non_params=lambda _: PartitionSpec(),
    )


def on_host(transform: optax.GradientTransformation, shardings: Any) -> Any:
    """The shardings of an optimiser's state with what mirrors a parameter in the hosts' pinned memory (2104.07857)."""
    return optax.tree_map_params(transform, lambda it: it.with_memory_kind("pinned_host"), shardings)


def fetch(transform: optax.GradientTransformation, state: Any, gradients: Any) -> Any:
    """The state on its devices, each array once its gradient is there.

    Fetched before, it would be beside all that gradients are made of.
    """

    def fetched(moment: Array, gradient: Array) -> Array:
        return jax.device_put(jax.lax.optimization_barrier((moment, gradient))[0], jax.memory.Space.Device)

    return optax.tree_map_params(transform, fetched, state, gradients)


def hand_back(transform: optax.GradientTransformation, state: Any) -> Any:
    """The state in its hosts' memory again."""
    return optax.tree_map_params(transform, lambda moment: jax.device_put(moment, jax.memory.Space.Host), state)


def squares(gradients: Any) -> Any:
    """The sum of squares of each array's shard, and of each layer's in a stack: not finite where a gradient is not."""

    def summed(gradient: Array, declared: Declaration) -> Array:
        return jnp.square(gradient).sum(axis=tuple(range("layers" in declared.axes, gradient.ndim)))

    return jax.tree.map(summed, gradients, declarations(gradients))


def global_norm(squares: Any, placement: Any) -> Float[Array, ""]:
    """The norm of the whole gradient, given `squares` of its shards: what is on every device is counted once."""
    sums: dict[tuple[str, ...], Array] = {}
    for square, spec in zip(jax.tree.leaves(squares), jax.tree.leaves(placement), strict=True):
        axes = divided(spec)
        sums[axes] = sums.get(axes, jnp.zeros(())) + square.sum()
    return jnp.sqrt(sum(jax.lax.psum(square, axes) if axes else square for axes, square in sums.items()))


def clip(gradients: Any, norm: Float[Array, ""], limit: float) -> Any:
    """Gradients scaled so that their global norm is at most `limit` (1211.5063)."""
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * scale, gradients)
