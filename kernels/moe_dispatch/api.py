"""The public `moe_dispatch` and `moe_combine`."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from kernels.choice import choose_kernel
from kernels.compat import known
from kernels.moe_dispatch import pallas_tpu, reference, xla
from kernels.moe_dispatch.plan import DispatchPlan, default_alignment, plan

_DISPATCH = {"reference": reference.dispatch, "xla": xla.dispatch, "pallas_tpu": pallas_tpu.dispatch}
_COMBINE = {"reference": reference.combine, "xla": xla.combine, "pallas_tpu": pallas_tpu.combine}


def moe_dispatch(
    x: Float[Array, "tokens d_model"],
    expert_index: Int[Array, "tokens choices"],
    num_experts: int,
    *,
    row_alignment: int | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "padded_rows d_model"], DispatchPlan]:
    """Copy tokens to rows sorted by expert: no capacity, no dropped token.

    rows[position[t, c]] = x[t]; every other row is zero.

    An expert's group begins at a multiple of `row_alignment`, so padded_rows is static: at most row_alignment - 1 rows
    an expert more than tokens * choices. By default it follows the rows an expert gets, from 8 to 256; the plan holds
    it, and `grouped_matmul` takes it from there.
    Entries of expert_index lie in [0, num_experts); a token may name one expert twice. `interpret` runs the Pallas
    kernels without a TPU: `pltpu.InterpretParams()`, or True.

    **Raises** ValueError where num_experts or row_alignment is below 1, an entry of expert_index that is known when
    tracing is no expert, or the implementation is unknown or has no kernel for the type.
    """
    _positive("num_experts", num_experts)
    if row_alignment is None:
        row_alignment = default_alignment(expert_index.size, num_experts)
    _positive("row_alignment", row_alignment)
    _check_experts(expert_index, num_experts)
    dispatch = choose_kernel("moe_dispatch", implementation, _DISPATCH, "x", x.dtype, interpret)
    with jax.named_scope("moe_dispatch"):
        layout = plan(expert_index, num_experts, row_alignment)
        return dispatch(x, layout), layout


def moe_combine(
    rows: Float[Array, "padded_rows d_model"],
    plan: DispatchPlan,
    weights: Float[Array, "tokens choices"],
    *,
    implementation: str | None = None,
    interpret: Any = None,
) -> Float[Array, "tokens d_model"]:
    """Sum each token's rows with the router's weights, in f32, in the type of the rows.

    y[t] = sum_c weights[t, c] rows[position[t, c]]

    **Raises** ValueError for an implementation that is unknown or has no kernel for the type.
    """
    combine = choose_kernel("moe_combine", implementation, _COMBINE, "rows", rows.dtype, interpret)
    with jax.named_scope("moe_combine"):
        return combine(rows, plan, weights)


def _check_experts(expert_index, num_experts: int) -> None:
    index = known(expert_index)
    if index is None:
        return
    outside = np.argwhere((index < 0) | (index >= num_experts))
    if outside.size:
        token, choice = outside[0]
        raise ValueError(
            f"moe_dispatch: expert_index[{token}, {choice}]={index[token, choice]} must be in [0, {num_experts}); "
            "pass indices of experts, or a larger num_experts"
        )


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"moe_dispatch: {name}={value} must be at least 1; pass 1 or more")
