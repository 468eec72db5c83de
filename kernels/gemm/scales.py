"""Which numbers of a scaled product share a scale."""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels.gemm.quantize import spread


@dataclass(frozen=True)
class Scaling:
    """What is static in a scaled product of x [rows, k] and w, [k, n] or if transposed [n, k]."""

    rows: int
    k: int
    n: int
    block_size: int
    transposed: bool
    dtype: Any
    """Of the result."""
    x_block: tuple[int, int]
    """Rows and columns of x that share a scale."""
    w_block: tuple[int, int]
    """The same for w, as it is stored."""

    @property
    def depth(self) -> int:
        """Products that share a scale of x and one of w: the kernel adds them up before it scales their sum."""
        return min(self.x_block[1], self.w_block[1 if self.transposed else 0])


def block_of(name: str, scales: jax.Array, shape: tuple[int, int], k_axis: int, block_size: int) -> tuple[int, int]:
    """The block that scales of this shape belong to. Along each axis there is one scale for all, one for each
    `block_size` numbers, or, along the axis that is not contracted, one for each number.

    **Raises** ValueError for any other shape.
    """
    sides = []
    for axis, (count, size) in enumerate(zip(scales.shape, shape, strict=True)):
        known = {1: max(size, 1), -(-size // block_size): block_size} | ({size: 1} if axis != k_axis else {})
        if count not in known:
            counts = ", ".join(str(it) for it in sorted(known))
            raise ValueError(
                f"scaled_matmul: {name}.shape[{axis}]={count} must be one of {counts} for {size} numbers in blocks of "
                f"block_size={block_size}; pass the block_size that the matrix was quantised with"
            )
        sides.append(known[count] if count > 1 else max(size, 1))
    return sides[0], sides[1]


def of_x(scales: Float[Array, "..."], scaling: Scaling) -> Float[Array, "blocks rows"]:
    """The scales of x for each block of k and each row."""
    return spread(scales, (scaling.rows, _blocks(scaling)), (scaling.x_block[0], 1)).T


def of_w(scales: Float[Array, "..."], scaling: Scaling) -> Float[Array, "blocks n"]:
    """The scales of w for each block of k and each column of the result."""
    scales, side = (scales.T, scaling.w_block[0]) if scaling.transposed else (scales, scaling.w_block[1])
    return spread(scales, (_blocks(scaling), scaling.n), (1, side))


def _blocks(scaling):
    return max(1, -(-scaling.k // max(scaling.depth, 1)))
