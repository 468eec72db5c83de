"""Attention on TPUs: Pallas kernels, forward and backward, that hold one block of the score matrix.

Layouts, padding to whole blocks, and the gradient's definition; the kernels are `pallas_forward` and `pallas_backward`,
and what they visit is `pallas_tables`.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels.compat import vary_alike
from kernels.flash_attention.pallas_backward import backward
from kernels.flash_attention.pallas_blocks import SHARE_OF_VMEM, BlockSizes, default_blocks
from kernels.flash_attention.pallas_forward import forward
from kernels.flash_attention.pallas_scores import LOG2_E, Block, element_inputs, scalars
from kernels.flash_attention.pallas_tables import kv_block, on_diagonal, q_block, schedule
from kernels.flash_attention.problem import Operands, Settings
from kernels.tpu import LANES, Generation, current_generation


@dataclass(frozen=True)
class _Plan:
    """What is decided before tracing a kernel, from the generation and the inputs' type."""

    blocks: BlockSizes
    generation: Generation | None
    interpret: Any

    def options(self, parallel: int, arbitrary: int) -> dict[str, Any]:
        """Arguments of `pallas_call`; the first grid axes may be split between the cores of a chip."""
        limit = None if self.generation is None else int(self.generation.vmem * SHARE_OF_VMEM)
        semantics = ("parallel",) * parallel + ("arbitrary",) * arbitrary
        params = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)
        return {"interpret": self.interpret or False, "compiler_params": params}

    def compute(self, dtype: Any) -> Any:
        """The type that the MXU takes for inputs of `dtype`."""
        return dtype if self.generation is None or self.generation.bf16_dot else jnp.float32

    def block(
        self, sizes: tuple[int, int, int], lengths: tuple[int, int], dtype: Any, operands: Operands, settings: Settings
    ) -> Block:
        """The static facts of a kernel: sizes of (queries, keys, parts), lengths of (queries, keys), inputs' type."""
        return Block(
            *sizes,
            kv_len=lengths[1],
            on_diagonal=on_diagonal(lengths, sizes[:2], operands, settings),
            settings=settings,
            compute=self.compute(dtype),
            # bf16 numbers are exact in one pass; f32 ones need several for the accuracy that f32 promises.
            precision=lax.Precision.DEFAULT if dtype == jnp.bfloat16 else lax.Precision.HIGHEST,
            rows_of=scalars(operands, 1)[1],
        )


def flash_attention(
    q: Float[Array, "batch q_len heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    operands: Operands,
    settings: Settings,
    *,
    interpret: Any = None,
    blocks: BlockSizes | None = None,
) -> tuple[Float[Array, "batch q_len heads head_dim"], Float[Array, "batch heads q_len"]]:
    """The result in q's type and the log-sum-exp of each row in f32.

    `blocks` replaces the generation's own; `interpret` runs the kernels without a TPU.

    **Raises** ValueError for blocks that do not fit.
    """
    generation = current_generation()
    head_dim = q.shape[3]
    # Narrow heads fill half a register's lanes; between 64 and 128 and above, whole registers are as fast.
    padded = 64 if head_dim <= 64 else -(-head_dim // LANES) * LANES
    has_blocks = settings.block_mask is not None or operands.block_mask is not None
    # A block mask that the kernel's blocks cannot follow becomes one of elements.
    masked = operands.mask is not None or (has_blocks and settings.block_size % LANES != 0)
    if blocks is None:
        length = q.shape[1]
        square = on_diagonal((length, k.shape[1]), (length, length), operands, settings)
        triangle = length if square and settings.window is None and not has_blocks and length == k.shape[1] else None
        blocks = default_blocks(generation, padded, q.dtype, masked, triangle)
    blocks = blocks.fitted(q.shape[1], k.shape[1], settings.block_size if has_blocks else None)
    if generation is not None:
        itemsize = q.dtype.itemsize if generation.bf16_dot else 4
        blocks.check(generation, padded, itemsize, masked, k.shape[1])
    q, k, v, operands = vary_alike((q, k, v, operands))
    q, k, v = (_pad(x, 3, padded) for x in (q, k, v))
    out, lse = _attend(q, k, v, operands, settings, _Plan(blocks, generation, interpret))
    return out[..., :head_dim], lse


def _forward(q, k, v, operands, settings, plan):
    batch, q_len, heads, _ = q.shape
    kv_len = k.shape[1]
    sizes = plan.blocks.q, plan.blocks.kv
    table = schedule((q_len, kv_len), sizes, operands, settings, (0, kv_len))
    numbers, _ = scalars(operands, batch)
    block = plan.block((*sizes, plan.blocks.chunk), (q_len, kv_len), q.dtype, operands, settings)

    def position(b, h, step, words, numbers):
        word = table.word(words, b, step)
        return b, h, q_block(word), kv_block(word)

    out, lse = forward(
        _scaled(q, block),
        _heads_first(k, block.kv, block),
        _heads_first(v, block.kv, block).swapaxes(2, 3),
        element_inputs(operands, settings, (batch, heads, q_len, kv_len), sizes, position),
        numbers,
        table,
        position,
        block,
        plan.options(2, 1),
    )
    return out[:, :, :, :q_len].transpose(0, 3, 1, 2).astype(q.dtype), lse[:, :, 0, :q_len]


def _saving(q, k, v, operands, settings, plan):
    out, lse = _forward(q, k, v, operands, settings, plan)
    return (out, lse), (q, k, v, operands, out, lse)


def _backward(settings, plan, saved, cotangents):
    q, k, v, operands, out, lse = saved
    g, g_lse = cotangents
    batch, q_len, heads, _ = q.shape
    kv_len, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    sizes = plan.blocks.q_backward, plan.blocks.kv_backward
    numbers, _ = scalars(operands, batch)
    block = plan.block((*sizes, plan.blocks.chunk_backward), (q_len, kv_len), q.dtype, operands, settings)
    # A row without keys: its probabilities are powers of minus infinity, and what the caller makes of its log-sum-exp
    # may be anything.
    empty = lse == -jnp.inf
    delta = jnp.einsum("bqhd,bqhd->bhq", out, g, preferred_element_type=jnp.float32) - jnp.where(empty, 0.0, g_lse)
    statistics = (jnp.where(empty, 1e30, lse * LOG2_E), delta)
    thin = [_pad(x, 2, -(-q_len // block.q) * block.q)[:, :, None] for x in statistics]
    rows = _scaled(q, block), _heads_first(g, block.q, block), *thin
    keys = _heads_first(k, block.kv, block)
    columns = keys, _heads_first(v, block.kv, block), keys.swapaxes(2, 3)

    def chunk(start):
        """The gradients of k and v for the keys from `start` that stay in vector memory, and their share of dq."""
        stop = min(start + plan.blocks.kv_resident, keys.shape[2])
        table = schedule((q_len, kv_len), sizes, operands, settings, (start, min(stop, kv_len)))

        def position(b, kv_head, member, step, words, numbers):
            word = table.word(words, b, step)
            return b, kv_head * group + member, q_block(word), kv_block(word)

        elements = element_inputs(operands, settings, (batch, heads, q_len, kv_len), sizes, position)
        whole = stop - start == keys.shape[2]
        dtype = block.compute if whole else jnp.float32
        options = plan.options(2, 2)
        return backward(rows, columns, elements, numbers, table, position, block, (start, stop), dtype, options)

    dqs, dks, dvs = zip(*(chunk(at) for at in range(0, keys.shape[2], plan.blocks.kv_resident)), strict=True)
    dq = functools.reduce(jnp.add, dqs).astype(q.dtype)[:, :, :, :q_len].transpose(0, 3, 1, 2)
    dk, dv = (jnp.concatenate(x, axis=2)[:, :, :kv_len].swapaxes(1, 2).astype(q.dtype) for x in (dks, dvs))
    return dq, dk, dv, None


_attend = jax.custom_vjp(_forward, nondiff_argnums=(4, 5))
_attend.defvjp(_saving, _backward)


def _scaled(q, block):
    """Queries times what their scores are multiplied with anyway, so that a score costs no multiplication."""
    return _heads_first((q.astype(jnp.float32) * block.multiplier).astype(q.dtype), block.q, block)


def _heads_first(x, size, block):
    """[batch, length, heads, head_dim] to [batch, heads, length, head_dim], padded to whole blocks.

    In the type of the products: where that is f32 for bf16 inputs, a cast on the way costs less than in the kernel,
    which reads a block many times and takes bf16 registers apart slowly.
    """
    return _pad(x.astype(block.compute), 1, -(-x.shape[1] // size) * size).swapaxes(1, 2)


def _pad(x, axis, size):
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
