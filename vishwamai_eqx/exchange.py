"""Rows to the devices that hold their experts, and back: whatever the load, none is dropped.

    route     from every device's counts: which of its rows go where, and which come from where
    deliver   rows sorted by expert -> the rows of the experts that are placed here, sorted by expert, then by sender
    collect   the same rows, processed -> where each came from

`deliver` and `collect` are each other's transpose. Between TPUs the rows go as they are (`ragged_all_to_all`), each
expert's straight to its place; elsewhere in packets of equal size, for which the worst load is room enough.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.choice import choose
from kernels.compat import vary_alike, zeros_varying_like
from kernels.moe_dispatch.plan import DispatchPlan, default_alignment, padded_rows
from kernels.tpu import current_generation
from vishwamai_eqx.mesh import index, size

Rows = Float[Array, "rows d_model"]


class Segments(eqx.Module):
    """Runs of rows on their way: one for each expert that this device sends to, or for each sender and expert here."""

    sizes: Int[Array, "segments"]
    own: Int[Array, "segments"]
    """Where they begin on this device."""
    others: Int[Array, "segments"]
    """Where they begin on the device at the other end."""
    packed: Int[Array, "segments"]
    """Where they begin among packets, one for each device at the other end."""


class Route(eqx.Module):
    """What goes where. A route of one device leads nowhere: rows stay as they are."""

    group_sizes: Int[Array, "local_experts"]
    """Rows of each expert that is placed here, alignment included: what `grouped_matmul` takes."""
    outward: Segments | None
    """Before `deliver`, by expert."""
    inward: Segments | None
    """After it, by sender, then by expert."""
    row_alignment: int = eqx.field(static=True)
    rows: tuple[int, int] = eqx.field(static=True)
    """Before and after `deliver`."""
    packet: int = eqx.field(static=True)
    """Rows that a device sends another one at most."""
    implementation: str = eqx.field(static=True)

    def deliver(self, rows: Rows) -> Float[Array, "delivered d_model"]:
        """Each expert's rows, from all devices, to the device where it is; zeros between and beyond the groups."""
        return rows if self.outward is None else _deliver(*vary_alike((rows, self)))

    def collect(self, rows: Rows) -> Float[Array, "collected d_model"]:
        """Rows in the order of `deliver`'s result to where `deliver` took them from; zeros elsewhere."""
        return rows if self.outward is None else _collect(*vary_alike((rows, self)))


def route(plan: DispatchPlan, implementation: str | None = None) -> Route:
    """The route over the mesh's `expert` axis of rows that are laid out by `plan`, which counts all experts.

    Inside `shard_map`, or outside of it, where there is one device. A token's choices are different experts, so a
    device never gets more of a token's rows than it has experts. `implementation` is "ragged" or "padded".

    **Raises** ValueError where the implementation is unknown.
    """
    automatic = "padded" if current_generation() is None else "ragged"
    implementation = choose("expert_exchange", implementation, ("padded", "ragged"), automatic)
    devices, (tokens, choices) = size("expert"), plan.position.shape
    experts = plan.counts.shape[0]
    here = experts // devices
    packet = tokens * min(choices, here)
    before = plan.source.shape[0]
    if devices == 1:
        return Route(plan.group_sizes, None, None, plan.row_alignment, (before, before), packet, implementation)

    alignment = default_alignment(tokens * choices, here)
    with jax.named_scope("route"):
        counts = jax.lax.all_gather(plan.counts, "expert")  # [senders, experts]
        me = index("expert")
        starts = exclusive(aligned(counts, plan.row_alignment), 1)
        groups = aligned(counts.sum(axis=0), alignment).reshape(devices, here)
        # Of each sender's rows for each expert: where they land on the expert's device, and where in their packet.
        landing = exclusive(counts, 0) + exclusive(groups, 1).reshape(-1)
        within = exclusive(counts.reshape(devices, devices, here), 2).reshape(devices, experts)

        def mine(a: Array) -> Array:
            """Columns of the experts that are placed here, in a row."""
            return jax.lax.dynamic_slice_in_dim(a, me * here, here, 1).reshape(-1)

        packets = jnp.repeat(jnp.arange(devices, dtype=counts.dtype) * packet, here)
        outward = Segments(counts[me], starts[me], landing[me], packets + within[me])
        inward = Segments(mine(counts), mine(landing), mine(starts), packets + mine(within))
    after = padded_rows(devices * packet, here, alignment)
    return Route(groups[me], outward, inward, alignment, (before, after), packet, implementation)


@jax.custom_vjp
def _deliver(rows: Array, route: Route) -> Array:
    return _send(rows, route, route.outward, route.inward, route.rows[1])


@jax.custom_vjp
def _collect(rows: Array, route: Route) -> Array:
    return _send(rows, route, route.inward, route.outward, route.rows[0])


_deliver.defvjp(lambda rows, route: (_deliver(rows, route), route), lambda route, g: (_collect(g, route), None))
_collect.defvjp(lambda rows, route: (_collect(rows, route), route), lambda route, g: (_deliver(g, route), None))


def _send(rows: Array, route: Route, away: Segments, here: Segments, length: int) -> Array:
    """The segments `away` of all devices, where `here` says that they arrive, in an array of that length."""
    if route.implementation == "ragged":
        space = zeros_varying_like((length, rows.shape[1]), rows.dtype, rows)
        return jax.lax.ragged_all_to_all(rows, space, away.own, away.sizes, away.others, here.sizes, axis_name="expert")
    packets = move(rows, away.sizes, away.own, away.packed, jax.lax.axis_size("expert") * route.packet)
    packets = jax.lax.all_to_all(packets, "expert", 0, 0, tiled=True)
    return move(packets, here.sizes, here.packed, here.own, length)


def move(
    rows: Rows,
    sizes: Int[Array, "segments"],
    source: Int[Array, "segments"],
    target: Int[Array, "segments"],
    length: int,
) -> Float[Array, "length d_model"]:
    """out[target[s] + i] = rows[source[s] + i] for i < sizes[s], and zeros elsewhere."""
    row = jnp.arange(length, dtype=sizes.dtype)[:, None]
    member = (row >= target) & (row < target + sizes)
    at = jnp.sum(jnp.where(member, row + source - target, 0), axis=1)
    taken = rows.at[at].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return jnp.where(member.any(axis=1)[:, None], taken, 0)


def aligned(counts: Array, alignment: int) -> Array:
    return -(-counts // alignment) * alignment


def exclusive(a: Array, axis: int) -> Array:
    """The sums of what comes before, along the axis."""
    return jnp.cumsum(a, axis=axis) - a
