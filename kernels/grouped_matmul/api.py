"""The public `grouped_matmul`."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from kernels.choice import choose_kernel
from kernels.compat import known
from kernels.grouped_matmul import pallas_tpu, reference, xla

_IMPLEMENTATIONS = {
    "reference": reference.grouped_matmul,
    "xla": xla.grouped_matmul,
    "pallas_tpu": pallas_tpu.grouped_matmul,
}


def grouped_matmul(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "groups _ _"],
    group_sizes: Int[Array, " groups"],
    implementation: str | None = None,
    *,
    row_alignment: int = 1,
    transposed: bool = False,
    interpret: Any = None,
) -> Float[Array, "rows n"]:
    """Multiply each group of consecutive rows by the group's own matrix, accumulated in f32, in lhs's type.

    out[r] = lhs[r] rhs[g] for the rows r of group g, with rhs [groups, k, n]; with `transposed`, rhs is [groups, n, k]
    and out[r] = lhs[r] rhs[g]ᵀ. Rows beyond sum(group_sizes) give zeros, and their gradients are zero.

    `row_alignment` is a promise that every group size is a multiple of it, as in a plan of `moe_dispatch`; a multiple
    of 8 that divides the rows saves a copy. rhs is rounded to lhs's type first; its gradient has rhs's own type.
    `interpret` runs the Pallas kernels without a TPU: `pltpu.InterpretParams()`, or True.

    **Raises** ValueError where rhs does not fit lhs, a group size that is known when tracing is negative, the groups
    have more rows than lhs, row_alignment is below 1, or the implementation is unknown or has no kernel for the type.
    """
    if rhs.shape[2 if transposed else 1] != lhs.shape[1]:
        expected = f"[groups, n, {lhs.shape[1]}]" if transposed else f"[groups, {lhs.shape[1]}, n]"
        raise ValueError(
            f"grouped_matmul: rhs has shape {list(rhs.shape)}, expected {expected} for lhs {list(lhs.shape)} with "
            f"transposed={transposed}; pass transposed={not transposed} if rhs is stored the other way round"
        )
    if row_alignment < 1:
        raise ValueError(f"grouped_matmul: row_alignment={row_alignment} must be at least 1; pass 1 for any sizes")
    _check_sizes(group_sizes, lhs.shape[0])
    product = choose_kernel("grouped_matmul", implementation, _IMPLEMENTATIONS, "lhs", lhs.dtype, interpret)
    with jax.named_scope("grouped_matmul"):
        return product(lhs, rhs, group_sizes, row_alignment, transposed)


def _check_sizes(group_sizes, rows: int) -> None:
    sizes = known(group_sizes)
    if sizes is None or sizes.size == 0:
        return
    group = int(np.argmin(sizes))
    if sizes[group] < 0:
        raise ValueError(
            f"grouped_matmul: group_sizes[{group}]={sizes[group]} must be at least 0; pass 0 for a group without rows"
        )
    total = int(sizes.sum(dtype=np.int64))
    if total > rows:
        raise ValueError(
            f"grouped_matmul: sum(group_sizes)={total} must be at most the {rows} rows of lhs; "
            f"take {total - rows} off the sizes, or pass lhs with {total} rows"
        )
