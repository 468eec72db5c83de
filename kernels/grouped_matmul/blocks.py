"""Block sizes of the grouped products on each TPU generation."""

from dataclasses import dataclass

from kernels.tpu import Generation

LANES = 128
# Rows of a tile, the best first. 512 leave 4% of a v6e's cycles to the step itself and 256 leave 8%, but tiles that fit
# the groups need no masks and are never visited twice.
ROWS = (512, 256)


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


def product_blocks(
    generation: Generation | None, rows: int, k: int, n: int, itemsize: int, row_alignment: int
) -> Blocks:
    """Blocks of lhs [rows, k] times rhs [groups, k, n]."""
    vmem, cores = _memory(generation)
    tile = _fit(next((tile for tile in ROWS if row_alignment % tile == 0), ROWS[0]), rows)
    for most_k in (4096, 2048, 1024, 512):
        block_k = divisor(k, most_k)
        for most_n in (4096, 2048, 1536, 1024, 512, 256):
            # A device of two cores shares the column blocks between them.
            block_n = divisor(n, min(most_n, max(LANES, n // cores)))
            used = 2 * itemsize * (tile * block_k + block_k * block_n + tile * block_n)
            used += 4 * tile * block_n * (block_k < k)
            if _widened(generation, itemsize):
                used += 4 * block_k * (tile + block_n)
            if used <= vmem * 3 // 4:
                return Blocks(tile, block_k, block_n, vmem)
    return Blocks(_fit(ROWS[-1], rows), divisor(k, 256), divisor(n, 256), vmem)


def gradient_blocks(
    generation: Generation | None, rows: int, k: int, n: int, itemsize: int, out_itemsize: int
) -> Blocks:
    """Blocks of lhs [rows, k]ᵀ times g [rows, n] for each group."""
    vmem, cores = _memory(generation)
    for tile, most_k in ((2 * ROWS[0], 1024), (ROWS[0], 1024), (ROWS[0], 512), (ROWS[-1], 512)):
        tile = _fit(tile, rows)
        block_k = divisor(k, most_k)
        for most_n in (4096, 2048, 1536, 1024, 512):
            block_n = divisor(n, min(most_n, max(LANES, n // cores)))
            used = 2 * itemsize * tile * (block_k + block_n) + block_k * block_n * (2 * out_itemsize + 4)
            if _widened(generation, itemsize):
                used += 4 * tile * (block_k + block_n)
            if used <= vmem * 3 // 4:
                return Blocks(tile, block_k, block_n, vmem)
    return Blocks(_fit(ROWS[-1], rows), divisor(k, 256), divisor(n, 256), vmem)


def divisor(size: int, most: int) -> int:
    """The largest block up to `most` lanes that divides a multiple of 128."""
    return max(block for block in range(LANES, max(min(size, most), LANES) + 1, LANES) if size % block == 0)


def _fit(tile: int, rows: int) -> int:
    return min(tile, -(-rows // 16) * 16)


def _memory(generation: Generation | None) -> tuple[int, int]:
    if generation is None:  # the interpreter
        return 2**24, 1
    return generation.vmem - 2**20, generation.cores


def _widened(generation: Generation | None, itemsize: int) -> bool:
    return generation is not None and not generation.bf16_dot and itemsize == 2
