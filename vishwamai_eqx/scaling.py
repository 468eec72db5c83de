"""How numbers are brought into the reach of narrow formats, from step to step: a part of the training state that
nothing else touches.

    before a step   `meters` says how each tensor is rounded to fp8, by the history of its largest numbers
    within it       the loss is `magnified`, so that small gradients are not zero, and its gradients are `reduced`;
                    what was seen of each tensor leaves with them, as its gradient: see `kernels.gemm.meters`
    behind it       `after` adds the largest numbers to the history, and halves or doubles the loss' factor;
                    `row` is what the logbook is told

Evaluation and generation, which have no history, take the numbers at hand.

Neither the optimiser nor clipping, decay or accumulation sees any of it: it is no parameter, and of microbatches the
largest is taken and not the sum. The factor is a power of two, which changes no digit of a gradient in f32; a gradient
that is not finite under it is skipped like any other (`skip`), and halves it (Mixed Precision Training, 1710.03740).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import Meter, Meters
from kernels.gemm.formats import E4M3, E5M2
from kernels.gemm.quantize import scales_of
from vishwamai_eqx import nonfinite
from vishwamai_eqx.config import SHARED_INPUTS, Config
from vishwamai_eqx.mesh import named, unknown
from vishwamai_eqx.parameters import declarations

Model = TypeVar("Model")
FORMATS = Meters(E4M3, E4M3, E5M2)
_FIRST = [first for first, *_ in SHARED_INPUTS]


class Magnifier(eqx.Module):
    """The factor of the loss."""

    factor: Float[Array, ""]
    taken: Int[Array, ""]
    """Steps taken with it."""


class Scaling(eqx.Module):
    """What is remembered of numbers."""

    largest: Any
    """A tree like the model: of each weight in fp8, `Meters` of the largest numbers, `[layers, history]`, the last step
    first. 0 before there was a step; None unless scales are delayed."""
    loss: Magnifier | None
    """None where the loss is as it is."""


class Told(NamedTuple):
    """Shares of the numbers in fp8 that it could not hold, over all tensors of a kind."""

    saturated: Meters | None
    underflown: Meters | None
    """None where nobody looked."""
    factor: Float[Array, ""] | None
    """Of the loss."""


def begin(model: Any, config: Config) -> Scaling:
    """The scaling of a new run."""
    largest = loss = None
    if config.precision == "fp8" and config.scaling.fp8 == "delayed":
        nothing = functools.partial(jnp.zeros, dtype=jnp.float32)
        largest = _of_weights(model, config, lambda layers: Meters(*[nothing((layers, config.scaling.history))] * 3))
    if config.scaling.loss == "dynamic" or (config.scaling.loss == "auto" and config.precision == "f16"):
        loss = Magnifier(jnp.float32(config.scaling.loss_start), jnp.zeros((), jnp.int32))
    return Scaling(largest, loss)


def magnified(loss: Callable[..., Any], scaling: Scaling) -> Callable[..., Any]:
    """The function whose first result is that of `loss` times the factor."""
    if (magnifier := scaling.loss) is None:
        return loss

    def larger(*arguments: Any) -> Any:
        value, more = loss(*arguments)
        return value * magnifier.factor, more

    return larger


def reduced(gradients: Model, scaling: Scaling) -> Model:
    """The gradients of the loss itself."""
    if (magnifier := scaling.loss) is None:
        return gradients
    return jax.tree.map(lambda gradient: gradient / magnifier.factor, gradients)


def meters(scaling: Scaling, model: Any, config: Config) -> Any:
    """A tree like the model of how each weight and what it is multiplied with are scaled; None where blocks are."""
    if config.precision != "fp8" or config.scaling.fp8 == "block":
        return None
    if scaling.largest is None:
        return _of_weights(model, config, lambda n: jax.tree.map(lambda zero: jnp.broadcast_to(zero, (n,)), unknown()))

    def meter(history: Array, dtype: Any) -> Meter:
        largest = history.max(axis=-1)
        # Of what has been zero until now nothing is known either.
        scale, nothing = jnp.where(largest > 0, scales_of(largest, dtype), 0.0), jnp.zeros_like(largest)
        return Meter(scale, nothing, nothing)

    return _tree(scaling.largest, lambda history: Meters(*map(meter, history, FORMATS)))


def together(one: Any, more: Any) -> Any:
    """What was seen in some microbatches and in one more."""

    def both(one: Meter, more: Meter) -> Meter:
        largest = None if one.scale is None else jnp.maximum(one.scale, more.scale)
        return Meter(largest, one.saturated + more.saturated, one.underflown + more.underflown)

    return jax.tree.map(both, one, more, is_leaf=lambda node: isinstance(node, Meter))


def after(scaling: Scaling, seen: Any, take: Bool[Array, ""], norm: Float[Array, ""], config: Config) -> Scaling:
    """The scaling once a step has seen what it has; within `shard_map`.

    A step that is not taken leaves no largest numbers. If its gradient, whose norm this is, was not finite, the factor
    of the loss is halved down to 1, on all devices alike.
    """
    largest, loss = scaling.largest, scaling.loss
    if largest is not None:

        def longer(meter: Meter, history: Float[Array, "layers history"]) -> Array:
            assert meter.scale is not None
            return jnp.where(take, jnp.concatenate([meter.scale[:, None], history[:, :-1]], axis=1), history)

        largest = jax.tree.map(longer, seen, largest, is_leaf=lambda node: isinstance(node, Meter))
    if loss is not None:
        beyond = nonfinite.devices(~jnp.isfinite(norm)) > 0
        taken = jnp.where(beyond, 0, loss.taken + take)
        full = taken >= config.scaling.loss_steps
        doubled = jnp.where(full, jnp.minimum(2 * loss.factor, 2.0**24), loss.factor)
        factor = jnp.where(beyond, jnp.maximum(loss.factor / 2, 1.0), doubled)
        loss = Magnifier(factor, jnp.where(full, 0, taken))
    return Scaling(largest, loss)


def told(scaling: Scaling, seen: Any, microbatches: int) -> Told:
    """What a step says of the numbers that it rounded, and of the factor that its loss had."""
    factor = None if scaling.loss is None else scaling.loss.factor
    of_weights = jax.tree_util.tree_leaves_with_path(seen, is_leaf=_is_meters)
    if not of_weights:
        return Told(None, None, factor)

    def mean(kind: str, what: str) -> Array:
        # Each tensor counts the same, and what several weights are multiplied with once.
        seen = [of for path, of in of_weights if kind != "inputs" or named(path, _FIRST)]
        return jnp.stack([getattr(getattr(of, kind), what).mean() for of in seen]).mean() / microbatches

    def shares(what: str) -> Meters:
        return Meters(*(mean(kind, what) for kind in Meters._fields))

    return Told(shares("saturated"), shares("underflown"), factor)


def row(told: Told) -> dict[str, Array]:
    """What a step says of its numbers, for the logbook."""
    found = {} if told.factor is None else {"loss_factor": told.factor}
    for what in ("saturated", "underflown"):
        if (shares := getattr(told, what)) is not None:
            found |= {f"fp8_{what}_{kind}": share for kind, share in shares._asdict().items()}
    return found


def _of_weights(model: Any, config: Config, make: Any) -> Any:
    """A tree like the model with what `make` makes of the layers of each weight in fp8."""

    def one(path: Any, leaf: Any, declared: Any) -> Any:
        wanted = declared.fp8 is not None and not named(path, config.scaling.skip)
        return make(leaf.shape[0]) if wanted else None

    return jax.tree_util.tree_map_with_path(one, model, declarations(model))


def _is_meters(node: Any) -> bool:
    return isinstance(node, Meters)


def _tree(tree: Any, make: Any) -> Any:
    return jax.tree.map(make, tree, is_leaf=_is_meters)
