"""Grouped products on TPUs: each step of the grid multiplies one tile of rows by the weights of one group.

Prefetched tables map the steps to tiles and groups, so that neither an empty group nor a tile beyond the last one costs
a product, and consecutive tiles of a group load its weights once.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.compat import output_like, vary_alike
from kernels.grouped_matmul.blocks import Blocks, gradient_blocks, product_blocks
from kernels.grouped_matmul.visits import visits
from kernels.grouped_matmul.words import narrow, rows_between, widen, words
from kernels.tpu import LANES, current_generation

# Columns that are computed at a time: the next ones' operands are widened while these are multiplied.
_COLUMNS = 512


@dataclass(frozen=True)
class _Settings:
    """What is static in a call."""

    row_alignment: int
    transposed: bool
    rhs_dtype: Any
    interpret: Any
    product: Blocks | None
    gradient: Blocks | None


def grouped_matmul(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "groups ..."],
    group_sizes: Int[Array, " groups"],
    row_alignment: int,
    transposed: bool,
    interpret: Any = None,
    product: Blocks | None = None,
    gradient: Blocks | None = None,
) -> Float[Array, "rows n"]:
    """out[r] = lhs[r] @ rhs[group of r]; zero beyond the last group.

    `product` and `gradient` replace the block sizes of the generation that it is traced for.
    """
    if lhs.shape[0] == 0 or rhs.shape[0] == 0:
        return jnp.zeros((lhs.shape[0], rhs.shape[1 if transposed else 2]), lhs.dtype)
    settings = _Settings(row_alignment, transposed, rhs.dtype, interpret, product, gradient)
    lhs, rhs, group_sizes = vary_alike((lhs, rhs, group_sizes.astype(jnp.int32)))
    out = _grouped(_whole_lanes(lhs, (1,)), _whole_lanes(rhs, (1, 2)), group_sizes, settings)
    return out[:, : rhs.shape[1 if transposed else 2]]


def _whole_lanes(x, axes):
    """Padded by zeros to multiples of 128, which the model's sizes are."""
    padding = [(0, -size % LANES if axis in axes else 0) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, padding) if any(after for _, after in padding) else x


def _value(lhs, rhs, group_sizes, settings):
    return _product(lhs, rhs, group_sizes, settings, settings.transposed, "grouped_matmul_fwd")


_grouped = jax.custom_vjp(_value, nondiff_argnums=(3,))


def _forward(lhs, rhs, group_sizes, settings):
    return _value(lhs, rhs, group_sizes, settings), (lhs, rhs, group_sizes)


def _backward(settings, saved, g):
    lhs, rhs, group_sizes = saved
    d_lhs = _product(g, rhs, group_sizes, settings, not settings.transposed, "grouped_matmul_dlhs")
    first, second = (g, lhs) if settings.transposed else (lhs, g)
    return d_lhs, _gradient(first, second, group_sizes, settings), None


_grouped.defvjp(_forward, _backward)


def _product(lhs, rhs, group_sizes, settings, transposed, name):
    """lhs [rows, k] times each group's rhs, [k, n] or if transposed [n, k]."""
    generation = current_generation()
    rhs = rhs.astype(lhs.dtype)
    (rows, k), groups, n = lhs.shape, rhs.shape[0], rhs.shape[1 if transposed else 2]
    blocks = settings.product or product_blocks(
        generation, rows, k, n, lhs.dtype.itemsize, settings.row_alignment, _passes(lhs.dtype)
    )
    blocks.check(k, n)
    table = visits(group_sizes, rows, blocks.rows)
    k_blocks = k // blocks.k

    def weights(n_i, v, k_i, tile, group, *_):
        member = jnp.minimum(group[v], groups - 1)
        return (member, n_i, k_i) if transposed else (member, k_i, n_i)

    rhs_shape = (blocks.n, blocks.k) if transposed else (blocks.k, blocks.n)
    scratch = {}
    if k_blocks > 1:
        scratch["sum"] = pltpu.VMEM((blocks.rows, blocks.n), jnp.float32)
    if _widened(generation, lhs.dtype):
        # Registers of 128 columns by themselves: only so may rows be stored with a stride.
        scratch["wide"] = pltpu.VMEM((rhs_shape[1] // LANES, rhs_shape[0], LANES), jnp.float32)
    kernel = functools.partial(
        _product_kernel,
        names=tuple(scratch),
        groups=groups,
        k_blocks=k_blocks,
        transposed=transposed,
        aligned=settings.row_alignment % blocks.rows == 0,
        precision=_precision(lhs.dtype),
    )
    out = output_like(lhs, (rows, n), lhs.dtype)
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=(n // blocks.n, table.tile.size, k_blocks),
            in_specs=[
                pl.BlockSpec((blocks.rows, blocks.k), lambda n_i, v, k_i, tile, *_: (tile[v], k_i)),
                pl.BlockSpec((None, *rhs_shape), weights),
            ],
            out_specs=pl.BlockSpec((blocks.rows, blocks.n), lambda n_i, v, k_i, tile, *_: (tile[v], n_i)),
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=_compiler_params(blocks),
        # A group's weights stay for its next tile unless k is cut.
        cost_estimate=_cost(rows * k * n, ((lhs, n // blocks.n), (rhs, 1)), out),
        interpret=settings.interpret or False,
    )(*table, lhs, rhs)


def _product_kernel(
    tile, group, low, high, lhs_ref, rhs_ref, out_ref, *scratch, names, groups, k_blocks, transposed, aligned, precision
):
    del tile
    refs = dict(zip(names, scratch, strict=True))
    v, k_i = pl.program_id(1), pl.program_id(2)
    (rows, n), itemsize = out_ref.shape, out_ref.dtype.itemsize

    def operand(columns, fresh):
        """The weights of some columns of the result; widened ones stay in vector memory for the group's next tile."""
        if "wide" not in refs:
            return rhs_ref[columns, :] if transposed else rhs_ref[:, columns]
        wide = refs["wide"]
        lanes = range(wide.shape[0]) if transposed else range(columns.start // LANES, columns.stop // LANES)
        inner = columns if transposed else slice(0, wide.shape[1])
        for lane in lanes if fresh else ():
            even, odd = widen(rhs_ref[inner, lane * LANES : (lane + 1) * LANES])
            wide[lane, pl.ds(inner.start, even.shape[0], 2), :] = even
            wide[lane, pl.ds(inner.start + 1, odd.shape[0], 2), :] = odd
        return jnp.concatenate([wide[lane, inner, :] for lane in lanes], axis=1)

    def store(columns, result, masked):
        """Write the rows of this visit; the first visit of a tile clears the others."""
        even, odd = result[: rows // 2], result[rows // 2 :]
        new = narrow(even, odd) if "wide" in refs else words(result.astype(out_ref.dtype))
        if masked and not aligned:
            keep = rows_between(low[v], high[v], result.shape, itemsize)
            others = jnp.where(low[v] == 0, jnp.uint32(0), ~keep)
            new = (new & keep) | (words(out_ref[:, columns]) & others)
        out_ref[:, columns] = pltpu.bitcast(new, out_ref.dtype)

    def multiply(fresh):
        lhs = jnp.concatenate(widen(lhs_ref[...]), axis=0) if "wide" in refs else lhs_ref[...]
        for start in range(0, n, _COLUMNS):
            columns = slice(start, min(start + _COLUMNS, n))
            contract = ((1,), (1 if transposed else 0,))
            result = _dot(lhs, operand(columns, fresh), contract, precision)
            if k_blocks == 1:
                store(columns, result, fresh)
            else:
                refs["sum"][:, columns] = result + jnp.where(k_i == 0, 0.0, refs["sum"][:, columns])

    occupied = (high[v] > low[v]) & (group[v] < groups)
    if "wide" in refs:
        # With several blocks of k no step finds the weights of the last. The steady step leaves out the masks too: a
        # tile that groups share widens its weights again.
        fresh = (k_blocks > 1) | (v == 0) | (group[v] != group[jnp.maximum(v - 1, 0)])
        fresh |= (low[v] > 0) | (high[v] < rows)
        pl.when(occupied & fresh)(functools.partial(multiply, True))
        pl.when(occupied & ~fresh)(functools.partial(multiply, False))
    else:
        pl.when(occupied)(functools.partial(multiply, True))

    if k_blocks > 1:

        @pl.when(occupied & (k_i == k_blocks - 1))
        def _():
            store(slice(0, n), refs["sum"][...], True)

    @pl.when((group[v] == groups) & (low[v] == 0))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)


def _gradient(lhs, g, group_sizes, settings):
    """For each group, lhs [rows, k]ᵀ times g [rows, n] over the group's rows."""
    generation = current_generation()
    (rows, k), n, groups = lhs.shape, g.shape[1], group_sizes.shape[0]
    dtype = settings.rhs_dtype
    blocks = settings.gradient or gradient_blocks(
        generation, rows, k, n, lhs.dtype.itemsize, dtype.itemsize, _passes(lhs.dtype)
    )
    blocks.check(k, n)
    table = visits(group_sizes, rows, blocks.rows)
    kernel = functools.partial(
        _gradient_kernel,
        groups=groups,
        aligned=settings.row_alignment % blocks.rows == 0,
        widened=_widened(generation, lhs.dtype),
        precision=_precision(lhs.dtype),
    )
    in_f32 = dtype == jnp.float32
    out = output_like(lhs, (groups, k, n), dtype)
    return pl.pallas_call(
        kernel,
        name="grouped_matmul_drhs",
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=(k // blocks.k, n // blocks.n, table.tile.size),
            in_specs=[
                pl.BlockSpec((blocks.rows, blocks.k), lambda k_i, n_i, v, tile, *_: (tile[v], k_i)),
                pl.BlockSpec((blocks.rows, blocks.n), lambda k_i, n_i, v, tile, *_: (tile[v], n_i)),
            ],
            out_specs=pl.BlockSpec(
                (None, blocks.k, blocks.n),
                lambda k_i, n_i, v, tile, group, *_: (jnp.minimum(group[v], groups - 1), k_i, n_i),
            ),
            scratch_shapes=[] if in_f32 else [pltpu.VMEM((blocks.k, blocks.n), jnp.float32)],
        ),
        compiler_params=_compiler_params(blocks),
        cost_estimate=_cost(rows * k * n, ((lhs, n // blocks.n), (g, k // blocks.k)), out),
        interpret=settings.interpret or False,
    )(*table, lhs, g)


def _gradient_kernel(tile, group, low, high, lhs_ref, g_ref, out_ref, *scratch, groups, aligned, widened, precision):
    del tile
    v = pl.program_id(2)
    sum_ref = scratch[0] if scratch else out_ref
    first = (v == 0) | (group[v] != group[jnp.maximum(v - 1, 0)])

    def rows_of_group(ref):
        """Other rows are zero in both operands: zero times what lies beyond the array may not be zero."""
        x = ref[...]
        if not aligned:
            keep = rows_between(low[v], high[v], x.shape, x.dtype.itemsize)
            x = pltpu.bitcast(words(x) & keep, x.dtype)
        # The order of the rows does not matter as long as it is the same in both.
        return jnp.concatenate(widen(x), axis=0) if widened else x

    @pl.when((high[v] > low[v]) & (group[v] < groups))
    def _():
        product = _dot(rows_of_group(lhs_ref), rows_of_group(g_ref), ((0,), (0,)), precision)
        total = product + jnp.where(first, 0.0, sum_ref[...])
        sum_ref[...] = total
        if scratch:
            out_ref[...] = total.astype(out_ref.dtype)

    @pl.when(first & (high[v] == low[v]) & (group[v] < groups))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)


def _dot(a, b, contract, precision):
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _precision(dtype):
    """bf16 products are exact in one pass; f32 ones need several, unless JAX is told that one is enough."""
    asked = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    one_pass = asked in ("default", "fastest", "bfloat16")
    return lax.Precision.DEFAULT if dtype == jnp.bfloat16 or one_pass else lax.Precision.HIGHEST


def _passes(dtype):
    return 6 if _precision(dtype) == lax.Precision.HIGHEST else 1


def _widened(generation, dtype):
    return generation is not None and not generation.bf16_dot and dtype == jnp.bfloat16


def _compiler_params(blocks):
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=blocks.vmem
    )


def _cost(products, reads, out):
    """What XLA schedules around the kernel by: multiplications, (operand, how often it is read) and the result."""
    moved = sum(times * x.size * x.dtype.itemsize for x, times in (*reads, (out, 1)))
    return pl.CostEstimate(flops=2 * products, bytes_accessed=moved, transcendentals=0)
