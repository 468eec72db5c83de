"""Dispatch and combine on TPUs: rows are fetched one by one, by prefetched indices.

A step of the grid has as many inputs as it gathers rows, each a block of one row of the same array, so that the
pipeline has all of a step's copies in flight at once. Forward and backward are gathers: a row has one writer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels.compat import output_like, vary_alike
from kernels.moe_dispatch.plan import DispatchPlan, owns_row, token_of_row
from kernels.tpu import current_generation

# Rows of a step: one tile of bf16 in memory, so that no two steps write to one tile.
STEP = 16
# Indices of a call: they lie in scalar memory, 16 KiB of it on v2 and v3 and 1 MiB on later generations.
_SCALARS, _SMALL_SCALARS = 2**16, 2**11


def dispatch(
    x: Float[Array, "tokens d_model"], plan: DispatchPlan, interpret: Any = None
) -> Float[Array, "padded_rows d_model"]:
    """Copy each token to the row of each of its choices."""
    return _dispatch(*vary_alike((x, plan)), interpret)


def combine(
    rows: Float[Array, "padded_rows d_model"],
    plan: DispatchPlan,
    weights: Float[Array, "tokens choices"],
    interpret: Any = None,
) -> Float[Array, "tokens d_model"]:
    """Sum each token's rows with their weights."""
    return _combine(*vary_alike((rows, plan, weights)), interpret)


def _rows_of_tokens(x, plan, scale, interpret):
    """Each row's token times the row's scale; zeros where no token is, whatever the token in its stead."""
    owned = jnp.where(owns_row(plan), scale, 0)[:, None]
    return _gather("moe_dispatch_rows", _scaled_sum, x, token_of_row(plan)[:, None], owned, x.dtype, interpret)


def _sums_of_rows(rows, plan, weights, interpret):
    return _gather("moe_dispatch_sum", _scaled_sum, rows, plan.position, weights, rows.dtype, interpret)


def _dispatched(x, plan, interpret):
    return _rows_of_tokens(x, plan, 1.0, interpret)


_dispatch = jax.custom_vjp(_dispatched, nondiff_argnums=(2,))


def _dispatch_forward(x, plan, interpret):
    return _dispatched(x, plan, interpret), plan


def _dispatch_backward(interpret, plan, g):
    return _sums_of_rows(g, plan, jnp.ones_like(plan.position, jnp.float32), interpret), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


def _combined(rows, plan, weights, interpret):
    return _sums_of_rows(rows, plan, weights, interpret)


_combine = jax.custom_vjp(_combined, nondiff_argnums=(3,))


def _combine_forward(rows, plan, weights, interpret):
    return _combined(rows, plan, weights, interpret), (rows, plan, weights)


def _combine_backward(interpret, saved, g):
    rows, plan, weights = saved
    scale = weights.reshape(-1)[jnp.minimum(plan.source, weights.size - 1)]
    d_rows = _rows_of_tokens(g, plan, scale, interpret).astype(rows.dtype)
    d_weights = _gather("moe_dispatch_dot", _products, rows, plan.position, g, weights.dtype, interpret)
    return d_rows, None, d_weights


_combine.defvjp(_combine_forward, _combine_backward)


def _scaled_sum(gathered, scales_ref, out_ref):
    """Sum over a step's choices of gathered rows times their scales; a scale of zero is no row."""
    scales = scales_ref[...]
    total = jnp.zeros(out_ref.shape, jnp.float32)
    for choice, rows_ref in enumerate(gathered):
        scale = scales[:, choice : choice + 1].astype(jnp.float32)
        total += jnp.where(scale == 0, 0.0, rows_ref[...] * scale)
    out_ref[...] = total.astype(out_ref.dtype)


def _products(gathered, g_ref, out_ref):
    """The inner products of gathered rows and g, one column for each choice."""
    g = g_ref[...].astype(jnp.float32)
    for choice, rows_ref in enumerate(gathered):
        product = jnp.sum(rows_ref[...] * g, axis=1, keepdims=True)
        out_ref[:, choice : choice + 1] = product.astype(out_ref.dtype)


def _gather(name, combine, source, index, operand, dtype, interpret):
    """Gather rows of `source` by index [rows, choices] and combine them with the rows of `operand`."""
    rows, choices = index.shape
    width = choices if combine is _products else source.shape[1]
    if rows == 0:
        return jnp.zeros((0, width), dtype)
    generation = current_generation()
    small = generation is not None and generation.vmem <= 2**24 and not generation.bf16_dot
    limit = max((_SMALL_SCALARS if small else _SCALARS) // choices, STEP)
    calls = pl.cdiv(rows, limit)
    size = pl.cdiv(pl.cdiv(rows, calls), STEP) * STEP
    padding = ((0, calls * size - rows), (0, 0))
    index, operand = (jnp.pad(x, padding).reshape(calls, size, x.shape[1]) for x in (index, operand))
    # Rows as slabs: the layout in memory keeps a row together, and a copy of one row whole.
    slabs = source[:, None, :]

    def call(index_and_operand):
        index, operand = index_and_operand
        return _gather_call(name, combine, slabs, index, operand, width, dtype, interpret)

    out = call((index[0], operand[0])) if calls == 1 else lax.map(call, (index, operand)).reshape(-1, width)
    return out[:rows]


def _gather_call(name, combine, slabs, index, operand, width, dtype, interpret):
    size, choices = index.shape
    count, depth = STEP * choices, slabs.shape[2]

    def kernel(_, *refs):
        inputs, operand_ref, out_ref, *gathered = refs[:count], *refs[count:]
        for slot, row in enumerate(inputs):
            gathered[slot % choices][slot // choices : slot // choices + 1, :] = row[0].astype(jnp.float32)
        combine(gathered, operand_ref, out_ref)

    def slab(slot):
        return pl.BlockSpec((1, 1, depth), lambda step, index: (index[step * count + slot], 0, 0))

    def step_rows(columns):
        return pl.BlockSpec((STEP, columns), lambda step, index: (step, 0))

    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=output_like(slabs, (size, width), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(size // STEP,),
            in_specs=[*(slab(slot) for slot in range(count)), step_rows(operand.shape[1])],
            out_specs=step_rows(width),
            scratch_shapes=[pltpu.VMEM((STEP, depth), jnp.float32)] * choices,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret or False,
    )(index.reshape(-1).astype(jnp.int32), *[slabs] * count, operand)
