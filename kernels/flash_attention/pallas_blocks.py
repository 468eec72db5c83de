"""Block sizes of the TPU kernels: defaults for each generation, and what fits its vector memory."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.tpu import LANES, Generation

# The compiler keeps some vector memory for itself: spilled registers and the second halves of its own copies.
SHARE_OF_VMEM = 0.9
# Queries and keys of a causal sequence that one block holds: the program grows with the square, and twice as many take
# minutes to compile.
ONE_BLOCK = 2048


@dataclass(frozen=True)
class BlockSizes:
    """Queries and keys of a block, in multiples of 128; a grid step computes one block of each."""

    q: int = 1024
    """Queries of a step: four parts, of which the first and the last overlap with nothing; 512 cost 14% more."""
    kv: int = 1024
    """Keys of a step: the same as queries, so that the blocks on a causal diagonal are squares."""
    q_backward: int = 512
    """Queries of a step of the backward pass."""
    kv_backward: int = 512
    """Keys of a step of the backward pass."""
    chunk: int = 256
    """Queries whose scores are computed while the exponentials of those before are: fewer do not hide a product's
    latency, more exceed the registers by more."""
    chunk_backward: int = 512
    """The same of the backward pass, whose five products hide each other's latency."""
    kv_resident: int = 8192
    """Keys whose gradients stay in vector memory while all queries pass; longer sequences take several calls."""

    def fitted(self, q_len: int, kv_len: int, block_mask: int | None) -> "BlockSizes":
        """No larger than the sequences, and dividing the blocks of a block mask where those are multiples of 128."""

        def fit(size, length):
            size = min(size, -(-length // LANES) * LANES)
            if block_mask is not None and block_mask % LANES == 0:
                size = LANES * math.gcd(size // LANES, block_mask // LANES)
            return size

        kv_backward = fit(self.kv_backward, kv_len)
        q, q_backward = fit(self.q, q_len), fit(self.q_backward, q_len)
        return BlockSizes(
            q=q,
            kv=fit(self.kv, kv_len),
            q_backward=q_backward,
            kv_backward=kv_backward,
            chunk=math.gcd(self.chunk, q),
            chunk_backward=math.gcd(self.chunk_backward, q_backward),
            kv_resident=max(self.kv_resident // kv_backward, 1) * kv_backward,
        )

    def forward_bytes(self, head_dim: int, itemsize: int, masked: bool) -> int:
        """Vector memory of a forward step: pipelined blocks twice, accumulators and the scores once."""
        lanes = max(head_dim, LANES)
        operands = (self.q + self.kv) * lanes * itemsize + 2 * self.kv * head_dim * itemsize
        operands += self.q * head_dim * itemsize + self.kv * self.q * masked
        # Scores of the next part, of this one, and the weights of the last one.
        scores = (8 + itemsize) * self.chunk * self.kv
        return 2 * operands + 4 * self.q * (head_dim + 16) + scores

    def backward_bytes(self, head_dim: int, itemsize: int, masked: bool, kv_len: int) -> int:
        """Vector memory of a backward step: also the gradients of the resident keys, and four score-sized values."""
        lanes = max(head_dim, LANES)
        resident = min(self.kv_resident, -(-kv_len // self.kv_backward) * self.kv_backward)
        q, kv = self.q_backward, self.kv_backward
        operands = (2 * q + 2 * kv) * lanes * itemsize + (kv + q) * head_dim * itemsize + kv * q * masked
        accumulators = 4 * (2 * resident * lanes + q * head_dim)
        return 2 * operands + accumulators + 4 * resident * lanes * itemsize + (8 + itemsize) * self.chunk_backward * kv

    def check(self, generation: Generation, head_dim: int, itemsize: int, masked: bool, kv_len: int) -> None:
        """**Raises** ValueError for blocks that are not multiples of 128 or exceed the vector memory."""
        for name in ("q", "kv", "q_backward", "kv_backward", "chunk", "chunk_backward", "kv_resident"):
            value = getattr(self, name)
            if value < LANES or value % LANES:
                raise ValueError(
                    f"flash_attention: block size {name}={value} must be a positive multiple of {LANES}; "
                    f"use {max(LANES, value // LANES * LANES)}"
                )
        limit = int(generation.vmem * SHARE_OF_VMEM)
        for needed, names in (
            (self.forward_bytes(head_dim, itemsize, masked), f"q={self.q}, kv={self.kv}"),
            (
                self.backward_bytes(head_dim, itemsize, masked, kv_len),
                f"q_backward={self.q_backward}, kv_backward={self.kv_backward}, kv_resident={self.kv_resident}",
            ),
        ):
            if needed > limit:
                raise ValueError(
                    f"flash_attention: block sizes {names} with head_dim={head_dim} need {needed / 2**20:.1f} MiB of "
                    f"vector memory, TPU {generation.name} has {limit / 2**20:.1f} for them; use smaller blocks"
                )


def default_blocks(
    generation: Generation | None, head_dim: int, dtype: DTypeLike, masked: bool = False, triangle: int | None = None
) -> BlockSizes:
    """The block sizes for a generation, a padded head_dim, the inputs' type, and whether there is a mask of elements.

    `triangle` is the length of a sequence whose queries see keys up to their own and no further. None is the
    interpreter.
    """
    # Where vector memory is 16 MiB, the gradients of 2,048 keys and their copies on the way out take half of it. A head
    # wider than a register's lanes takes as many times the memory.
    small = generation is not None and generation.vmem <= 16 * 2**20
    wide = -(-head_dim // LANES)
    resident = (2048 if small else 8192) // wide
    if jnp.dtype(dtype).itemsize == 4:
        # Six passes for each product of f32 numbers: the fixed costs of a step are small beside 256 queries already.
        return BlockSizes(256, 256, 256, 256, chunk_backward=256, kv_resident=resident)
    if small and masked:
        # The compiler widens the mask of a whole block: with the scores and dropout's hash, 1024 do not fit.
        return BlockSizes(512, 512, 256, 256, 256, 256, resident)
    if wide > 1:
        return BlockSizes(512, 512, 256, 256, 256, 256, resident)
    if generation is None or small or masked or triangle is None or triangle > ONE_BLOCK:
        return BlockSizes(kv_resident=resident)
    # All of it one block, whose parts leave out the keys that none of their queries sees: 15% and 26% fewer cycles on
    # v5e than blocks of 1024 and 512, which begin and end more often and see half of their diagonal for nothing.
    length = -(-triangle // 256) * 256
    return BlockSizes(length, length, length, length, chunk_backward=256, kv_resident=resident)
