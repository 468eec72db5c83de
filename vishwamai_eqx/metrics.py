"""What a training step says of itself: to the logbook, to the rules that skip steps, and to people."""

import equinox as eqx
from jaxtyping import Array, Float, Int, UInt32

from vishwamai_eqx import nonfinite, scaling, skip, teaching


class Metrics(eqx.Module):
    """Of one step, the same on every device."""

    loss: Float[Array, ""]
    """Cross-entropy in nats a token."""
    balance: Float[Array, ""]
    router_z: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    tokens: Int[Array, ""]
    load: Float[Array, "layers experts"] | None
    """Each expert's share of its layer's choices."""
    batch: UInt32[Array, "2"]
    """The two halves of the batch's hash."""
    watch: skip.Watch
    """Whether the step was skipped, and what was usual."""
    broken: nonfinite.Broken
    """Where numbers were not finite."""
    told: teaching.Told | None
    scaled: scaling.Told
