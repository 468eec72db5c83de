"""Steps that are not taken: a loss or a gradient that is not finite, or far beyond the last ones, changes nothing.

    within the step      `judge` decides, `choose` keeps the old state or takes the new one, `Watch` goes with the state
    beside the loop      `Skips` records what was skipped, and says when to go back and when to give up

A skipped step counts as a step all the same: its batch is behind the run, and the next step has the next one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vishwamai_eqx import nonfinite
from vishwamai_eqx.config import GuardConfig
from vishwamai_eqx.data import BatchHash

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
    take = nonfinite.devices(bad) == 0
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


def go_on(state: Any, last: Any) -> Any:
    """A restored training state at the step of the last one, as if the batches up to it had been seen.

    The factor of the loss stays the last one's: where it was too large, it would be so again.
    """
    skipped = jax.device_put(jnp.zeros_like(state.watch.skipped), state.watch.skipped.sharding)
    watch = dataclasses.replace(state.watch, skipped=skipped)
    scaling = dataclasses.replace(state.scaling, loss=last.scaling.loss)
    return dataclasses.replace(state, step=last.step, watch=watch, scaling=scaling)


def reason(metrics: Any) -> str:
    """Why a step with those metrics of `train.py` was skipped."""
    watch, loss, norm = metrics.watch, float(metrics.loss), float(metrics.grad_norm)
    where = nonfinite.first(metrics.broken, loss)
    return (
        f"{f'{where} was the first that was not finite' if where else 'a spike'}; loss {loss:.4g} (mean "
        f"{float(watch.loss):.4g}), gradient norm {norm:.4g} (mean {float(watch.grad_norm):.4g}), "
        f"batch {BatchHash(metrics.batch)}"
    )


class Skips:
    """What the loop does about skipped steps: records each, and says when there are too many.

    A step is looked at when the next one is under way, so that the device always has one to go on with.

    **Arguments**

    - `patience`: so many skipped steps in a row are too many.
    - `on_event`: called as `on_event("skipped", message, step=step)` for each skipped step.
    """

    def __init__(self, patience: int, on_event: Callable[..., None]):
        self.patience, self._on_event = patience, on_event
        self.went_back = False
        """Whether the run has gone back to a checkpoint, and saved none since."""
        self.streak: list[str] = []
        """What was recorded of the steps that were skipped in a row."""
        self._last: tuple[int, Any] | None = None

    def too_many(self, step: int, metrics: Any) -> bool:
        """Whether the step before `step`, whose metrics are kept for the next call, was one skipped step too many."""
        last, self._last = self._last, None if metrics is None else (step, metrics)
        if last is None:
            return False
        step, metrics = last
        skipped = int(metrics.watch.skipped)
        if not skipped:
            self.streak.clear()
            return False
        message = f"skipped, {skipped} in a row: {reason(metrics)}"
        self.streak.append(f"step {step}: {message}")
        self._on_event("skipped", message, step=step)
        if skipped < self.patience:
            return False
        self._last = None
        return True

    def report(self) -> str:
        """What to tell whoever started the run, when it stops for good."""
        return "\n".join(
            [
                f"stopped: {self.patience} steps in a row were skipped, again after going back to a checkpoint",
                *self.streak[-self.patience :],
                "--replay STEP does one of them again. Not finite: look at that layer, at that batch, or begin with a "
                "lower --optim.learning-rate. Spikes that should pass: raise --guard.loss-spike or --guard.grad-spike.",
            ]
        )
