"""Block sizes of the scaled product on each TPU generation."""

import math
from dataclasses import dataclass

from kernels.tpu import LANES, Generation

# 8-bit numbers lie 32 rows to a register.
ROWS = 32
# Cycles of matrix work in a step: the step's fixed cost is 1 to 2% of so many, and the program grows with them.
_CYCLES = 12_500
_LENGTHS = (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 128)


@dataclass(frozen=True)
class Blocks:
    """What one step of the kernel's grid works on."""

    rows: int
    """Rows of x: the more, the less often w is read and widened."""
    k: int
    """Columns of x: all of them if they fit, so that no partial sum is stored and loaded again."""
    n: int
    """Columns of the result: the more, the less often x is read and widened."""
    vmem: int
    """Bytes that the kernel may use."""

    def check(self, depth: int) -> None:
        """**Raises** ValueError for blocks that cut a register, or numbers that share a scale."""
        for name, block, unit in (("rows", self.rows, ROWS), ("k", self.k, depth), ("n", self.n, LANES)):
            if block < unit or block % unit:
                raise ValueError(
                    f"scaled_matmul: block size {name}={block} must be a multiple of {unit}; leave the blocks out for "
                    "the generation's own"
                )


def scaled_blocks(
    generation: Generation | None, rows: int, k: int, n: int, depth: int, itemsizes: tuple[int, int, int]
) -> Blocks:
    """Blocks of x [rows, k] times w [k, n] in multiples of `depth` along k: of those that fit, those with the least
    work beside the products. `itemsizes` are those of x, w and the result.

    That is, per product: handling x again for each block of n and w for each block of rows, partial sums for each block
    of k, and a step's own cost.
    """
    vmem, cores = (2**24, 1) if generation is None else (generation.vmem - 2**20, generation.cores)
    rate = 2**16 if generation is None else generation.mxus * generation.mxu_size**2 * generation.rows_per_cycle
    x_size, w_size, out_size = itemsizes
    unit = math.lcm(depth, LANES)

    def used(tile, block_k, block_n):
        inputs = tile * block_k * x_size + block_k * block_n * w_size + tile * block_n * out_size
        # Beside what is copied in and out while a step computes: operands widened, and sums; where memory is small the
        # sums of each part of k count too, for which the compiler keeps room though few live at a time.
        kept = 1 + (0.4 * (block_k // depth) if vmem < 2**24 else 0)
        return 2 * inputs + 4 * (tile * block_k + block_k * min(block_n, 512)) + 4 * tile * block_n * kept

    def overhead(tile, block_k, block_n):
        return 1 / block_n + 1 / tile + (block_k < k) * 2 / block_k + 256 / (tile * block_k * block_n)

    def fits(tile, block_k, block_n):
        # The compiler keeps some of the memory for itself.
        return used(tile, block_k, block_n) <= 0.85 * vmem and tile * block_k * block_n <= _CYCLES * rate

    found = {
        (min(tile, up(rows, ROWS)), _divisor(up(k, unit), most_k, unit), _divisor(up(n, LANES), most_n, LANES))
        for tile in (1024, 512, 256, 128)
        for most_k in _LENGTHS
        # A device of two cores shares the column blocks between them.
        for most_n in {min(length, max(LANES, n // cores)) for length in _LENGTHS}
    }
    fitting = [blocks for blocks in found if fits(*blocks)] or [min(found, key=lambda blocks: used(*blocks))]
    return Blocks(*min(fitting, key=lambda blocks: (overhead(*blocks), blocks)), vmem)


def up(size: int, unit: int) -> int:
    """The next multiple of the unit."""
    return -(-size // unit) * unit


def _divisor(size, most, unit):
    """The largest multiple of the unit up to `most`, and at least one unit, that divides a multiple of it."""
    return max(block for block in range(unit, max(min(size, most), unit) + 1, unit) if size % block == 0)
