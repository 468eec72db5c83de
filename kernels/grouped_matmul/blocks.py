"""Block sizes of the grouped products on each TPU generation."""

from dataclasses import dataclass

from kernels.tpu import LANES, Generation

# Rows of a tile, the best first. 512 leave 4% of a v6e's cycles to the step itself and 256 leave 8%, but tiles that fit
# the groups need no masks and are never visited twice.
ROWS = (512, 256)
# Cycles of matrix work in a step: the step's fixed cost is 1 to 2% of so many, and the program grows with them.
_CYCLES = 10_000
_LENGTHS = (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 128)


@dataclass(frozen=True)
class Blocks:
    """What one step of a kernel's grid works on."""

    rows: int
    """Rows of a tile: the more, the less a step's fixed cost shows, and the more a group's last tile wastes."""
    k: int
    """Columns of lhs: all of them if they fit, so that no partial product is stored and loaded again."""
    n: int
    """Columns of the result: all of them if they fit, so that lhs is read once."""
    vmem: int
    """Bytes that the kernel may use."""

    def check(self, k: int, n: int) -> None:
        """**Raises** ValueError for blocks that do not divide a product of these sizes, in registers of 128 columns."""
        for name, block, size, unit in (("k", self.k, k, LANES), ("n", self.n, n, LANES), ("rows", self.rows, 0, 16)):
            if block < unit or size % block or block % unit:
                raise ValueError(
                    f"grouped_matmul: block size {name}={block} must be a multiple of {unit} that divides {name}"
                    f"{f'={size}' if size else ''}; leave the blocks out for the generation's own"
                )


def product_blocks(
    generation: Generation | None, rows: int, k: int, n: int, itemsize: int, row_alignment: int, passes: int = 1
) -> Blocks:
    """Blocks of lhs [rows, k] times rhs [groups, k, n]: of those that fit, those with the least work beside products.

    That is, per product: handling lhs again for each block of n, partial sums for each block of k, and weights widened
    for each tile where k is cut. `passes` are the passes through the MXU that a product takes.
    """
    fitting = next((tile for tile in ROWS if row_alignment % tile == 0), None)
    widened = _widened(generation, itemsize)

    def used(tile, block_k, block_n):
        size = 2 * itemsize * (tile * block_k + block_k * block_n + tile * block_n) + 4 * tile * min(block_n, 512)
        return size + 4 * tile * block_n * (block_k < k) + 4 * block_k * (tile + block_n) * widened

    def overhead(tile, block_k, block_n):
        cut = block_k < k
        return (
            (1 + 2 * widened) / block_n
            + cut * 2 / block_k
            + (cut and widened) / tile
            + 256 / (tile * block_k * block_n)
        )

    return _least(generation, [fitting] if fitting else ROWS, (rows, k, n), passes, used, overhead)


def gradient_blocks(
    generation: Generation | None, rows: int, k: int, n: int, itemsize: int, out_itemsize: int, passes: int = 1
) -> Blocks:
    """Blocks of lhs [rows, k]ᵀ times g [rows, n] for each group.

    Per product: lhs transposed for each block of n, g handled for each block of k, the sum for each tile.
    """
    widened = _widened(generation, itemsize)

    def used(tile, block_k, block_n):
        # Beside the inputs twice: both masked or widened, and lhs transposed.
        copies = (4 if widened else itemsize) * tile * (2 * block_k + block_n)
        return 2 * itemsize * tile * (block_k + block_n) + copies + block_k * block_n * (2 * out_itemsize + 4)

    def overhead(tile, block_k, block_n):
        return 2 / block_n + 1 / block_k + 2 / tile

    return _least(generation, (2 * ROWS[0], *ROWS), (rows, k, n), passes, used, overhead)


def _least(generation, tiles, sizes, passes, used, overhead):
    rows, k, n = sizes
    vmem, cores = (2**24, 1) if generation is None else (generation.vmem - 2**20, generation.cores)
    # A device of two cores shares the column blocks between them.
    columns = max(LANES, n // cores)
    found = {
        (min(tile, -(-rows // 16) * 16), divisor(k, most_k), divisor(n, min(most_n, columns)))
        for tile in tiles
        for most_k in _LENGTHS
        for most_n in _LENGTHS
    }
    rate = 2**16 if generation is None else generation.mxus * generation.mxu_size**2 * generation.rows_per_cycle

    def fits(tile, block_k, block_n):
        # The compiler keeps some of the memory for itself.
        return used(tile, block_k, block_n) <= 0.85 * vmem and tile * block_k * block_n * passes <= _CYCLES * rate

    fitting = [blocks for blocks in found if fits(*blocks)] or [min(found, key=lambda blocks: used(*blocks))]
    return Blocks(*min(fitting, key=lambda blocks: (overhead(*blocks), blocks)), vmem)


def divisor(size: int, most: int) -> int:
    """The largest block up to `most` lanes that divides a multiple of 128."""
    return max(block for block in range(LANES, max(min(size, most), LANES) + 1, LANES) if size % block == 0)


def _widened(generation: Generation | None, itemsize: int) -> bool:
    return generation is not None and not generation.bf16_dot and itemsize == 2
