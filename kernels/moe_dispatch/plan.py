"""Where every routed row goes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True)
class DispatchPlan:
    """Which row each choice of each token takes, and the reverse.

    Rows are sorted by expert, and by token within an expert. Expert e's group begins at sum(group_sizes[:e]), a
    multiple of row_alignment; its first counts[e] rows are tokens, the others are zeros.
    """

    position: Int[Array, "tokens choices"]
    """The row of a choice."""
    source: Int[Array, " padded_rows"]
    """The choice of a row, counted token by token; tokens * choices for a row that is alignment only."""
    group_sizes: Int[Array, " experts"]
    """Rows of each expert's group, alignment included: what `grouped_matmul` takes."""
    counts: Int[Array, " experts"]
    """Choices that fell on each expert."""
    row_alignment: int
    """What every group size is a multiple of."""


def _flatten(plan: DispatchPlan):
    return (plan.position, plan.source, plan.group_sizes, plan.counts), plan.row_alignment


def _unflatten(row_alignment, leaves) -> DispatchPlan:
    # Transformations rebuild a pytree around things that are not arrays, which the constructor's checks would refuse.
    plan = object.__new__(DispatchPlan)
    plan.__dict__.update(zip(("position", "source", "group_sizes", "counts"), leaves, strict=True))
    plan.__dict__["row_alignment"] = row_alignment
    return plan


jax.tree_util.register_pytree_node(DispatchPlan, _flatten, _unflatten)


def default_alignment(rows: int, num_experts: int) -> int:
    """A power of two from 8 to 256, about a quarter of an expert's even share: then an eighth of rows is padding."""
    share = max(1, rows // (4 * num_experts))
    return min(256, max(8, 1 << (share.bit_length() - 1)))


def padded_rows(rows: int, num_experts: int, row_alignment: int) -> int:
    """The rows that suffice whatever the load: each expert that has one wastes at most row_alignment - 1 of them."""
    most = rows + min(rows, num_experts) * (row_alignment - 1)
    return most // row_alignment * row_alignment


def plan(expert_index: Int[Array, "tokens choices"], num_experts: int, row_alignment: int) -> DispatchPlan:
    """Rank every choice within its expert by a cumulative one-hot, and lay the groups out."""
    expert = expert_index.reshape(-1)
    one_hot = expert[:, None] == jnp.arange(num_experts, dtype=expert.dtype)
    running = jnp.cumsum(one_hot, axis=0, dtype=jnp.int32)
    counts = running[-1]
    group_sizes = -(-counts // row_alignment) * row_alignment
    starts = jnp.cumsum(group_sizes) - group_sizes
    position = jnp.sum(jnp.where(one_hot, starts + running - 1, 0), axis=1, dtype=jnp.int32)
    choices = expert.shape[0]
    source = jnp.full(padded_rows(choices, num_experts, row_alignment), choices, jnp.int32)
    source = source.at[position].set(jnp.arange(choices, dtype=jnp.int32), unique_indices=True)
    return DispatchPlan(
        position.reshape(expert_index.shape), source, group_sizes.astype(jnp.int32), counts, row_alignment
    )


def owns_row(plan: DispatchPlan) -> Bool[Array, " padded_rows"]:
    """True where a row holds a token."""
    return plan.source < plan.position.size


def token_of_row(plan: DispatchPlan) -> Int[Array, " padded_rows"]:
    """The token of each row; any token for a row that is alignment only."""
    tokens, choices = plan.position.shape
    return jnp.minimum(plan.source // choices, tokens - 1)
