"""The public `moe_dispatch` and `moe_combine`."""

import jax
from jaxtyping import Array, Float, Int

from kernels.choice import choose
from kernels.moe_dispatch import reference, xla
from kernels.moe_dispatch.plan import DispatchPlan, default_alignment, plan

_IMPLEMENTATIONS = {"reference": reference, "xla": xla}


def moe_dispatch(
    x: Float[Array, "tokens d_model"],
    expert_index: Int[Array, "tokens choices"],
    num_experts: int,
    *,
    row_alignment: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "padded_rows d_model"], DispatchPlan]:
    """Copy tokens to rows sorted by expert: no capacity, no dropped token.

    rows[position[t, c]] = x[t]; every other row is zero.

    An expert's group begins at a multiple of `row_alignment`, so padded_rows is static: at most row_alignment - 1 rows
    an expert more than tokens * choices. By default it follows the rows an expert gets, from 8 to 256; the plan holds
    it, and `grouped_matmul` takes it from there.
    Entries of expert_index lie in [0, num_experts); a token may name one expert twice.

    **Raises** ValueError where num_experts or row_alignment is below 1, or the implementation is unknown.
    """
    _positive("num_experts", num_experts)
    if row_alignment is None:
        row_alignment = default_alignment(expert_index.size, num_experts)
    _positive("row_alignment", row_alignment)
    name = choose("moe_dispatch", implementation, _IMPLEMENTATIONS, "xla")
    with jax.named_scope("moe_dispatch"):
        layout = plan(expert_index, num_experts, row_alignment)
        return _IMPLEMENTATIONS[name].dispatch(x, layout), layout


def moe_combine(
    rows: Float[Array, "padded_rows d_model"],
    plan: DispatchPlan,
    weights: Float[Array, "tokens choices"],
    *,
    implementation: str | None = None,
) -> Float[Array, "tokens d_model"]:
    """Sum each token's rows with the router's weights, in f32, in the type of the rows.

    y[t] = sum_c weights[t, c] rows[position[t, c]]

    **Raises** ValueError for an unknown implementation.
    """
    name = choose("moe_combine", implementation, _IMPLEMENTATIONS, "xla")
    with jax.named_scope("moe_combine"):
        return _IMPLEMENTATIONS[name].combine(rows, plan, weights)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"moe_dispatch: {name}={value} must be at least 1; pass 1 or more")
