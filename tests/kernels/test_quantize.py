"""Rounding to 8 bits: to the nearest number of the format, in blocks with scales, whatever the block holds."""

import functools

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels.gemm.formats import FORMATS
from kernels.gemm.quantize import block_maxima, losses, quantize, scales_of, spread
from tests.kernels import formats64 as exact
from tests.kernels.comparison import normal

SHAPE = (5, 12)
BLOCKS = {"tensor": None, "activations": (1, 8), "weights": (4, 8), "rows": (1, 12), "columns": (5, 1)}
# Up to where a value can round up without leaving f32.
NUMBERS = st.floats(-(2.0**120), 2.0**120, width=32) | st.sampled_from([0.0, 1e-40, 2.0**-126, 1e4, 448.0, 57344.0])


@functools.partial(jax.jit, static_argnums=(1, 2))
def there_and_back(x, dtype, block, scales=None):
    found = kernels.quantize(x, dtype, block, scales=scales)
    return found, kernels.dequantize(found, block), spread(found.scales, x.shape, block), losses(x, found, block)


@pytest.mark.parametrize("name", exact.TYPES)
@given(data=st.data())
def test_every_number_becomes_the_nearest(name, data):
    block = data.draw(st.sampled_from([BLOCKS["activations"], BLOCKS["weights"], None]))
    small = data.draw(st.sampled_from([1.0, 2.0**-100, 2.0**-130]))
    x = data.draw(arrays.arrays(np.float32, SHAPE, elements=NUMBERS)) * np.float32(small)
    (values, _), back, scales, lost = there_and_back(x, exact.TYPES[name], block)
    x, values, scales = (np.asarray(it, np.float64) for it in (x, values, scales))
    exact.assert_within(back, x, exact.error(x, name, block), name)
    # The scale is the least that will do, or the next power of two.
    needed, some = exact.maxima(x, block) / exact.LARGEST[name], exact.maxima(x, block) >= exact.TINY
    assert (scales[~some] == 1).all() and (needed <= scales * (1 + exact.ROUNDING)).all()
    most = needed * (1 + exact.ROUNDING) if name == "int8" else 2 * needed
    assert (scales <= np.maximum(most, exact.TINY))[some].all()
    assert name == "int8" or (np.frexp(scales)[0] == 0.5).all()
    # Nothing in the format is nearer.
    distance = np.abs(x[..., None] / scales[..., None] - exact.numbers(name)).min(-1)
    off = np.abs(x / scales - values)
    assert (off <= distance + exact.ROUNDING * np.abs(values) + exact.TINY / scales).all()
    assert lost.saturated == 0
    normal = (np.abs(x) >= exact.TINY) & (values == 0)
    assert lost.underflown == normal.sum()


@pytest.mark.parametrize("block", BLOCKS)
def test_scales_belong_to_blocks(block):
    """Blocks at the edges are smaller; every block's numbers have the largest one's scale."""
    x = normal(0, SHAPE)
    sides = BLOCKS[block] or SHAPE
    count = tuple(-(-size // side) for size, side in zip(SHAPE, sides, strict=True))
    (_, scales), _, wide, _ = there_and_back(x, jnp.int8, BLOCKS[block])
    assert scales.shape == block_maxima(x, BLOCKS[block]).shape == count
    np.testing.assert_allclose(wide, exact.maxima(x, BLOCKS[block]) / 127, rtol=1e-6)


def test_the_table_of_formats_is_the_formats():
    for name, dtype in exact.TYPES.items():
        it = FORMATS[jnp.dtype(dtype)]
        assert (it.largest, it.relative, it.step) == (exact.LARGEST[name], exact.RELATIVE[name], exact.STEP[name])
        largest, before = exact.numbers(name)[[-1, -2]]
        assert it.overflow == largest + (largest - before) / 2


@pytest.mark.parametrize("name", exact.TYPES)
@pytest.mark.parametrize("given_scale", [False, True])
def test_a_block_with_what_is_no_number_is_nan(name, given_scale):
    """And no other block: one row each of numbers, an infinity, a NaN, the other infinity among zeros."""
    x = np.ones((4, 8), np.float32)
    x[1, 3], x[2, 0], x[3] = np.inf, np.nan, 0
    x[3, 7] = -np.inf
    x = jnp.asarray(x)
    scales = jnp.full((4, 1), 0.5) if given_scale else None
    found, back, _, lost = there_and_back(x, exact.TYPES[name], (1, 8), scales)
    back = np.asarray(back)
    np.testing.assert_array_equal(np.isnan(found.scales)[:, 0], [False, True, True, True])
    np.testing.assert_array_equal(np.isnan(back), np.isnan(back[:, :1]) | np.zeros((4, 8), bool))
    np.testing.assert_allclose(back[0], 1, rtol=1e-6)
    assert lost == (0, 0)


@pytest.mark.parametrize("name", exact.TYPES)
def test_an_outlier_costs_what_the_format_says(name):
    """One number of 1e4 among a thousand small ones: floats keep most of their neighbours' digits, int8 none."""
    x = normal(0, (8, 128)).at[3, 5].set(1e4)
    (values, _), back, _, lost = there_and_back(x, exact.TYPES[name], (1, 128))
    exact.assert_within(back, x, exact.error(x, name, (1, 128)), name)
    gone = int(np.sum(np.asarray(values[3], np.float32) == 0))
    assert lost.underflown == np.sum(np.asarray(values, np.float32) == 0)
    assert gone == 127 if name == "int8" else gone < 10
    assert np.abs(np.asarray(back)[3, 5] - 1e4) <= 1e4 * exact.RELATIVE[name] + 1


@pytest.mark.parametrize("name", exact.TYPES)
def test_given_scales_saturate_and_are_counted(name):
    largest = exact.LARGEST[name]
    half_step = (exact.numbers(name)[-1] - exact.numbers(name)[-2]) / 2
    x = 0.25 * np.asarray([[largest, -largest - 0.9 * half_step, 1.2 * largest, -1e30, 0, 1e-30, -1e-30, 1]])
    scales = jnp.full((1, 1), 0.25)
    _, back, _, lost = there_and_back(jnp.asarray(x, jnp.float32), exact.TYPES[name], None, scales)
    np.testing.assert_allclose(back[0, :7], 0.25 * largest * np.asarray([1, -1, 1, -1, 0, 0, 0]))
    assert lost == (2, 2)


@pytest.mark.parametrize("shape", [(0, 12), (5, 0), (0, 0)])
@pytest.mark.parametrize("block", ["tensor", "weights"])
def test_no_numbers(shape, block):
    found, back, _, lost = there_and_back(jnp.zeros(shape), jnp.int8, BLOCKS[block])
    assert back.shape == found.values.shape == shape
    assert np.isfinite(found.scales).all() and lost == (0, 0)


def test_what_is_quantised_again_is_not_rounded_again():
    """Of floats: along the other axis only numbers too small for their new neighbours go."""
    x = normal(0, (64, 64))
    once = there_and_back(x, jnp.float8_e4m3fn, (1, 32))[1].astype(jnp.bfloat16)
    twice = there_and_back(once, jnp.float8_e4m3fn, (32, 1))[1]
    changed = np.abs(np.asarray(twice, np.float64) - np.asarray(once, np.float64))
    assert (changed <= exact.smallest(once, "e4m3", (32, 1))).all() and (changed > 0).mean() < 0.02


def test_a_history_of_maxima_makes_scales():
    np.testing.assert_array_equal(scales_of(jnp.asarray([0, 448, 449, 1e-45]), jnp.float8_e4m3fn), [1, 1, 2, 1])
    assert np.isnan(scales_of(jnp.asarray([np.inf, np.nan]), jnp.int8)).all()


def test_errors():
    with pytest.raises(ValueError, match=r"dtype=float16 must be one of float8_e4m3fn, float8_e5m2, int8"):
        quantize(jnp.ones((2, 2)), jnp.float16)
    with pytest.raises(ValueError, match=r"scales has shape \[1, 2\], expected \[2, 1\], one a block"):
        quantize(jnp.ones((2, 2)), jnp.int8, (1, 2), scales=jnp.ones((1, 2)))
