"""The public `grouped_matmul`."""

import jax
from jaxtyping import Array, Float, Int

from kernels.choice import choose
from kernels.grouped_matmul import reference, xla

_IMPLEMENTATIONS = {"reference": reference.grouped_matmul, "xla": xla.grouped_matmul}


def grouped_matmul(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "groups _ _"],
    group_sizes: Int[Array, " groups"],
    implementation: str | None = None,
    *,
    row_alignment: int = 1,
    transposed: bool = False,
) -> Float[Array, "rows n"]:
    """Multiply each group of consecutive rows by the group's own matrix, accumulated in f32, in lhs's type.

    out[r] = lhs[r] rhs[g] for the rows r of group g, with rhs [groups, k, n]; with `transposed`, rhs is [groups, n, k]
    and out[r] = lhs[r] rhs[g]ᵀ. Rows beyond sum(group_sizes) give zeros, and their gradients are zero.

    `row_alignment` is a promise that every group size is a multiple of it, as in a plan of `moe_dispatch`; a multiple
    of 256 saves a copy. rhs is rounded to lhs's type first; its gradient has rhs's own type.

    **Raises** ValueError where rhs does not fit lhs, row_alignment is below 1, or the implementation is unknown.
    """
    if rhs.shape[2 if transposed else 1] != lhs.shape[1]:
        expected = f"[groups, n, {lhs.shape[1]}]" if transposed else f"[groups, {lhs.shape[1]}, n]"
        raise ValueError(
            f"grouped_matmul: rhs has shape {list(rhs.shape)}, expected {expected} for lhs {list(lhs.shape)} with "
            f"transposed={transposed}; pass transposed={not transposed} if rhs is stored the other way round"
        )
    if row_alignment < 1:
        raise ValueError(f"grouped_matmul: row_alignment={row_alignment} must be at least 1; pass 1 for any sizes")
    name = choose("grouped_matmul", implementation, _IMPLEMENTATIONS, "xla")
    with jax.named_scope("grouped_matmul"):
        return _IMPLEMENTATIONS[name](lhs, rhs, group_sizes, row_alignment, transposed)
