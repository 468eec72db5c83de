"""What the TPU kernel of grouped products visits, its block sizes, and its rows of 16 bits in words of 32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import kernels
from kernels.grouped_matmul import pallas_tpu
from kernels.grouped_matmul.blocks import Blocks, gradient_blocks, product_blocks
from kernels.grouped_matmul.visits import visits
from kernels.grouped_matmul.words import narrow, rows_between, widen, words
from kernels.tpu import GENERATIONS
from tests.kernels.comparison import assert_close, normal

cut = jax.jit(visits, static_argnums=(1, 2))


@given(sizes=st.lists(st.integers(0, 40), min_size=4, max_size=4), tile=st.sampled_from([8, 16, 48]))
def test_every_row_of_a_group_is_visited_once(sizes, tile):
    rows = 100
    for index in range(4):
        sizes[index] = min(sizes[index], rows - sum(sizes[:index]))
    table = cut(jnp.asarray(sizes, jnp.int32), rows, tile)
    tiles, groups, lows, highs = (np.asarray(column) for column in table)
    owner = np.full(-(-rows // tile) * tile, 4)
    owner[: sum(sizes)] = np.repeat(np.arange(4), sizes)
    seen = np.zeros_like(owner)
    for tile_index, group, low, high in zip(tiles, groups, lows, highs, strict=True):
        span = slice(tile_index * tile + low, tile_index * tile + high)
        assert 0 <= low <= high <= tile or low == high
        assert (owner[span] == group).all()
        seen[span] += 1
    assert (seen[owner < 4] == 1).all() and (np.diff(tiles) >= 0).all() and (np.diff(groups) >= 0).all()
    for group, size in enumerate(sizes):
        # An output block is written where its group is visited, and begins with rows if the group has any.
        first = np.flatnonzero(groups == group)[0]
        assert (highs[first] > lows[first]) == (size > 0)
    # A tile beyond the last group is cleared by a visit of no group that begins it.
    beyond = {t for t in range(-(-rows // tile)) if owner[t * tile] == 4}
    assert beyond == {t for t, g, low in zip(tiles, groups, lows, strict=True) if g == 4 and low == 0}


def in_kernel(body, out, *arrays):
    """The value of a function inside a kernel."""

    def kernel(*refs):
        refs[-1][...] = body(*(ref[...] for ref in refs[:-1]))

    return pl.pallas_call(kernel, out_shape=out, interpret=True)(*arrays)


def test_words_round_as_a_cast_does():
    x = np.asarray(normal(0, (32, 128))).copy()
    # Ties to even both ways, a carry into the exponent, and what is no number.
    x[0, :8] = [1 + 2**-8, 1 + 3 * 2**-8, np.inf, -np.inf, np.nan, -0.0, 3.4e38, 2 - 2**-9]
    x.view(np.uint32)[1, 0] = 0x7FFFFFFF
    x = jnp.asarray(x)
    packed = jax.ShapeDtypeStruct((32, 128), jnp.bfloat16)
    got = in_kernel(lambda even, odd: pltpu.bitcast(narrow(even, odd), jnp.bfloat16), packed, x[0::2], x[1::2])
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(x.astype(jnp.bfloat16), np.float32))
    wide = in_kernel(lambda x: jnp.concatenate(widen(x)), jax.ShapeDtypeStruct((32, 128), jnp.float32), got)
    np.testing.assert_array_equal(wide, np.concatenate([got[0::2], got[1::2]]).astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_between_leaves_out_what_is_no_number(dtype):
    x = normal(0, (32, 256), dtype).at[:5].set(jnp.nan).at[18:].set(jnp.inf)

    def body(x):
        return pltpu.bitcast(words(x) & rows_between(5, 18, x.shape, x.dtype.itemsize), x.dtype)

    got = in_kernel(body, jax.ShapeDtypeStruct(x.shape, dtype), x)
    np.testing.assert_array_equal(got, jnp.zeros_like(x).at[5:18].set(x[5:18]))


@pytest.mark.parametrize("generation", GENERATIONS.values(), ids=lambda it: it.name)
def test_blocks_divide_and_fit(generation):
    for itemsize in (2, 4):
        for k, n in ((768, 3072), (3072, 768), (4096, 16384), (128, 128), (17 * 128, 128)):
            product = product_blocks(generation, 8192, k, n, itemsize, 1)
            gradient = gradient_blocks(generation, 8192, k, n, itemsize, 4)
            for blocks in (product, gradient):
                assert k % blocks.k == n % blocks.n == blocks.rows % 16 == 0
                assert blocks.vmem < generation.vmem
            assert 2 * itemsize * (product.rows * (product.k + product.n) + product.k * product.n) < product.vmem
            assert (
                2 * itemsize * gradient.rows * (gradient.k + gradient.n) + 12 * gradient.k * gradient.n < product.vmem
            )
    assert product_blocks(generation, 8192, 768, 3072, 2, 256).rows == 256, "tiles that fit the groups"
    assert product_blocks(generation, 20, 768, 3072, 2, 1).rows == 32


def both_passes(lhs, rhs, sizes, transposed, **options):
    def loss(lhs, rhs):
        if options:
            out = pallas_tpu.grouped_matmul(lhs, rhs, sizes, 1, transposed, **options)
        else:
            out = kernels.grouped_matmul(lhs, rhs, sizes, "reference", transposed=transposed)
        return jnp.sum(out.astype(jnp.float32) * normal(4, out.shape)), out

    gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(lhs, rhs)
    return out, *gradients


@pytest.mark.parametrize("generation", [None, pytest.param("v3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("transposed", [False, True])
def test_several_blocks_of_every_axis(transposed, generation, monkeypatch):
    """k, n and rows cut, in bf16; v3 has no bf16 product, so that there operands are widened."""
    monkeypatch.setattr(pallas_tpu, "current_generation", lambda: GENERATIONS.get(generation))
    shape = (4, 384, 256) if transposed else (4, 256, 384)
    lhs, rhs = normal(0, (60, 256), jnp.bfloat16), normal(1, shape, jnp.bfloat16)
    sizes = jnp.asarray([17, 0, 30, 3])
    want = jax.jit(functools.partial(both_passes, transposed=transposed))(lhs, rhs, sizes)
    small = Blocks(rows=16, k=128, n=128, vmem=2**24)
    interpret = True if generation is None else pltpu.InterpretParams()  # the former cannot store with a stride
    for product in (small, None):
        options = {"product": product, "gradient": small, "interpret": interpret}
        got = jax.jit(functools.partial(both_passes, transposed=transposed, **options))(lhs, rhs, sizes)
        assert_close(got, want, jnp.bfloat16, f"{generation} {product}")


def test_blocks_that_do_not_divide_are_refused():
    lhs, rhs, sizes = jnp.ones((8, 256)), jnp.ones((1, 256, 128)), jnp.asarray([8])
    for blocks, message in (
        (Blocks(16, 384, 128, 2**24), "k=384 .* divides k=256"),
        (Blocks(8, 128, 128, 2**24), "rows=8"),
    ):
        with pytest.raises(ValueError, match=message):
            pallas_tpu.grouped_matmul(lhs, rhs, sizes, 1, False, interpret=True, product=blocks)


def test_under_the_interpreter_that_finds_races(capfd):
    """Two cores, uninitialised memory that is not a number, and every read checked against every write."""
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")
    blocks = Blocks(16, 128, 128, 2**24)
    options = {"product": blocks, "gradient": blocks, "interpret": params}
    lhs, rhs = normal(0, (40, 128)), normal(1, (3, 128, 256))
    sizes = jnp.asarray([5, 0, 21])
    got = jax.jit(functools.partial(both_passes, transposed=False, **options))(lhs, rhs, sizes)
    assert_close(got, both_passes(lhs, rhs, sizes, False), jnp.float32, "interpreted")
    assert "RACE" not in capfd.readouterr().out
