"""The scaled product on TPUs.

Sums over the numbers that share scales are scaled as they are added up in f32. What a generation's MXU cannot multiply
is widened in vector memory: 8 bits to bf16, or to f32 where there is no bf16 product either. Both are exact, so every
generation computes the same numbers, and 8 bits are what is copied.

An MXU of 256 is half empty while 128 products are summed. There fp8 is scaled first, in bf16 and exactly, and all of k
is summed at once: half the cycles, at the rate of bf16.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from kernels.compat import output_like, vary_alike
from kernels.gemm.blocks import Blocks, scaled_blocks, up
from kernels.gemm.formats import FORMATS, INT8
from kernels.gemm.scales import Scaling, of_w, of_x
from kernels.tpu import LANES, current_generation

# Columns that are computed at a time: the next ones' operands are widened while these are multiplied.
_COLUMNS = 512


def scaled_matmul(
    x: Shaped[Array, "rows k"],
    w: Shaped[Array, "..."],
    x_scales: Float[Array, "..."] | None,
    w_scales: Float[Array, "..."],
    scaling: Scaling,
    interpret: Any = None,
    blocks: Blocks | None = None,
) -> Float[Array, "rows n"]:
    """(x x_scales) @ (w w_scales). `blocks` replaces the block sizes of the generation that it is traced for.

    **Raises** ValueError for scales of fewer than 128 products, or no multiple of them.
    """
    rows, k, n = scaling.rows, scaling.k, scaling.n
    if 0 in (rows, k, n):
        return jnp.zeros((rows, n), scaling.dtype)
    x, w, x_scales, w_scales = vary_alike((x, w, x_scales, w_scales))
    generation = current_generation()
    uniform = scaling.depth >= k
    depth = LANES if uniform else scaling.depth
    if depth % LANES:
        raise ValueError(
            f"scaled_matmul: block_size={depth} must be a multiple of {LANES} for implementation 'pallas_tpu'; "
            "quantise in such blocks, or pass implementation='xla'"
        )
    itemsizes = x.dtype.itemsize, w.dtype.itemsize, scaling.dtype.itemsize
    blocks = blocks or scaled_blocks(generation, rows, k, n, depth, itemsizes)
    blocks.check(depth)
    all_rows, all_k, all_n = up(rows, blocks.rows), up(k, blocks.k), up(n, blocks.n)
    # Padding is zeros with scale zero.
    x = _padded(x, (all_rows, all_k))
    w = _padded(w, (all_n, all_k) if scaling.transposed else (all_k, all_n))
    grid = all_n // blocks.n, all_rows // blocks.rows, all_k // blocks.k
    parts = 1 if uniform else blocks.k // depth

    def by_step(scales, columns):
        """[steps along k, parts of a step, columns]; one step where scales are the same along k."""
        return _padded(scales, (1 if uniform else all_k // depth, columns)).reshape(-1, parts, columns)

    def step(k_i):
        return 0 if uniform else k_i

    if scaling.transposed:
        w_spec = pl.BlockSpec((blocks.n, blocks.k), lambda n_i, m_i, k_i: (n_i, k_i))
    else:
        w_spec = pl.BlockSpec((blocks.k, blocks.n), lambda n_i, m_i, k_i: (k_i, n_i))
    scaled_first = INT8 not in (x.dtype, w.dtype) and not uniform
    scaled_first &= generation is not None and generation.mxu_size > depth
    operands = [x, w, by_step(of_w(w_scales, scaling), all_n)]
    specs = [
        pl.BlockSpec((blocks.rows, blocks.k), lambda n_i, m_i, k_i: (m_i, k_i)),
        w_spec,
        pl.BlockSpec((None, parts, blocks.n), lambda n_i, m_i, k_i: (step(k_i), 0, n_i)),
    ]
    if x_scales is not None:
        operands.append(by_step(of_x(x_scales, scaling), all_rows))
        specs.append(pl.BlockSpec((None, parts, blocks.rows), lambda n_i, m_i, k_i: (step(k_i), 0, m_i)))
    out = output_like(x, (all_rows, all_n), scaling.dtype)
    y = pl.pallas_call(
        functools.partial(
            _kernel,
            parts=parts,
            scaled_x=x_scales is not None,
            transposed=scaling.transposed,
            fed=_fed(generation, jnp.dtype(jnp.bfloat16) if scaled_first else x.dtype),
            scaled_first=scaled_first,
        ),
        name="gemm_scaled",
        out_shape=out,
        grid=grid,
        in_specs=specs,
        out_specs=pl.BlockSpec((blocks.rows, blocks.n), lambda n_i, m_i, k_i: (m_i, n_i)),
        scratch_shapes=[pltpu.VMEM((blocks.rows, blocks.n), jnp.float32)] if grid[2] > 1 else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem
        ),
        cost_estimate=_cost(operands, out, grid, rows * k * n),
        interpret=interpret or False,
    )(*operands)
    return y[:rows, :n]


def _kernel(x_ref, w_ref, w_scales_ref, *refs, parts, scaled_x, transposed, fed, scaled_first):
    x_scales_ref, *refs = refs if scaled_x else (None, *refs)
    out_ref, *scratch = refs
    k_i, last = pl.program_id(2), pl.num_programs(2) - 1
    depth, n = x_ref.shape[1] // parts, out_ref.shape[1]

    def feed(numbers):
        return numbers if fed is None else numbers.astype(fed)

    x, x_scales = feed(x_ref[...]), None if x_scales_ref is None else x_scales_ref[...].T
    if scaled_first and x_scales is not None:
        x = _scaled(x, x_scales, 1)

    def scaled_product(columns):
        """Of scaled numbers: all of k at once."""
        scales = w_scales_ref[:, columns]
        w, axis = (w_ref[columns, :], 1) if transposed else (w_ref[:, columns], 0)
        return _dot(x, _scaled(feed(w), scales.T if transposed else scales, axis), transposed, x_ref.dtype)

    def product(columns, part):
        """Of a part of k, with one scale a row and one a column."""
        inner = slice(part * depth, (part + 1) * depth)
        w = feed(w_ref[columns, inner] if transposed else w_ref[inner, columns])
        sums = _dot(x[:, inner], w, transposed, x_ref.dtype)
        # One after the other: both scales together may leave f32's range where the product does not.
        sums = sums if x_scales is None else sums * x_scales[:, part : part + 1]
        return sums * w_scales_ref[part : part + 1, columns]

    for start in range(0, n, _COLUMNS):
        columns = slice(start, min(start + _COLUMNS, n))
        total: Any = jnp.where(k_i == 0, 0.0, scratch[0][:, columns]) if scratch else 0.0
        if scaled_first:
            total += scaled_product(columns)
        else:
            for part in range(parts):
                total += product(columns, part)
        if not scratch:
            out_ref[:, columns] = total.astype(out_ref.dtype)
        else:
            scratch[0][:, columns] = total

            @pl.when(k_i == last)
            def _(columns=columns, total=total):
                out_ref[:, columns] = total.astype(out_ref.dtype)


def _dot(x, w, transposed, stored):
    contract = ((1,), (1 if transposed else 0,)), ((), ())
    if x.dtype == INT8:
        return lax.dot_general(x, w, contract, preferred_element_type=jnp.int32).astype(jnp.float32)
    # One pass holds what was 8 or 16 bits exactly.
    precision = lax.Precision.HIGHEST if stored == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)


def _scaled(x, scales, axis):
    """Each part of an axis, which has as many as scales, times its own."""
    count = scales.shape[axis]
    pairs = zip(jnp.split(x, count, axis), jnp.split(scales.astype(x.dtype), count, axis), strict=True)
    return jnp.concatenate([part * scale for part, scale in pairs], axis)


def _fed(generation, dtype):
    """The type in which operands go into the MXU; None: as they are."""
    if dtype in FORMATS:
        if generation is None or generation.fp8:
            return None
        dtype = jnp.dtype(jnp.bfloat16)
    widened = dtype == jnp.bfloat16 and generation is not None and not generation.bf16_dot
    return jnp.dtype(jnp.float32) if widened else dtype


def _padded(x, shape):
    padding = [(0, after - before) for before, after in zip(x.shape, shape, strict=True)]
    return jnp.pad(x, padding) if x.shape != tuple(shape) else x


def _cost(operands, out, grid, products):
    """What XLA schedules around the kernel by: x is read for each block of n, w for each of rows unless k is whole."""
    x, w, *scales = (it.size * it.dtype.itemsize for it in operands)
    moved = x * grid[0] + w * (grid[1] if grid[2] > 1 else 1) + sum(scales) + out.size * out.dtype.itemsize
    return pl.CostEstimate(flops=2 * products, bytes_accessed=moved, transcendentals=0)
