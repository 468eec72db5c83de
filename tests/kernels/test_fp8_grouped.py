"""The grouped product in fp8: each group's is within the formats' bounds of that in f64, and so are the gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from tests.kernels import formats64 as exact
from tests.kernels.comparison import normal

SIDE = 8
ROW, SQUARE = (1, SIDE), (SIDE, SIDE)


def check(x, w, g, sizes, transposed=False):
    """Values and gradients against those of f64; rows beyond the groups give zeros and take none."""

    @jax.jit
    def run(x, w, g):
        product = functools.partial(
            kernels.fp8_grouped_matmul, group_sizes=jnp.asarray(sizes), block_size=SIDE, transposed=transposed
        )
        y, pull = jax.vjp(product, x, w.swapaxes(1, 2) if transposed else w)
        return y, *pull(g)

    y, dx, dw = run(x, w, g)
    dw = dw.swapaxes(1, 2) if transposed else dw
    x, w, g = (np.asarray(it, np.float64) for it in (x, w, g))
    start = 0
    for group, size in enumerate(sizes):
        rows, weight = slice(start, start + size), w[group]
        of_x, of_g = exact.error(x, "e4m3", ROW)[rows], exact.error(g, "e5m2", ROW)[rows]
        of_w = exact.error(weight, "e4m3", SQUARE)
        exact.assert_within(
            y[rows], x[rows] @ weight, exact.product_error(x[rows], of_x, weight, of_w), f"y of {group}"
        )
        bound = exact.product_error(g[rows], of_g, weight.T, of_w.T)
        exact.assert_within(dx[rows], g[rows] @ weight.T, bound, f"dx of {group}")
        bound = exact.product_error(x[rows].T, of_x.T, g[rows], of_g)
        exact.assert_within(dw[group], x[rows].T @ g[rows], bound, f"dw of {group}")
        start += size
    assert not np.any(y[start:]) and not np.any(dx[start:])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(16, 0, 24), (0, 0, 40), (8, 8, 8), (0, 0, 0)], ids=str)
def test_groups_of_any_size(sizes, transposed):
    x, w, g = normal(0, (40, 24)), normal(1, (3, 24, 16)), normal(2, (40, 16))
    check(x.at[3, 5].set(1e4).at[4].set(0), w, g, sizes, transposed)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_no_number_stays_in_its_row(value):
    """Of y and dx; in the gradient of the weights, which nobody takes then, it may be anywhere."""
    x, w, sizes = normal(0, (32, 24)).at[3, 5].set(value), normal(1, (3, 24, 16)), jnp.asarray([16, 0, 16])
    product = functools.partial(kernels.fp8_grouped_matmul, group_sizes=sizes, block_size=SIDE)
    y, pull = jax.vjp(jax.jit(product), x, w)
    dx, dw = pull(jnp.ones_like(y))
    assert np.isnan(y[3]).all() and np.isfinite(np.delete(y, 3, axis=0)).all() and np.isfinite(dx).all()
    assert np.isnan(dw[0]).any()


@given(data=st.data())
@settings(max_examples=10)
def test_numbers_of_any_magnitude(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))

    def numbers(*shape):
        return jnp.asarray(rng.normal(size=shape) * np.exp2(rng.integers(-12, 12, shape)), jnp.float32)

    cuts = np.sort(rng.integers(0, 21, 2))
    check(numbers(20, 12), numbers(3, 12, 9), numbers(20, 9), tuple(int(n) for n in np.diff([0, *cuts, 20])))


def test_what_is_rounded_once_serves_two_products():
    """And results and gradients have the types of what was rounded."""
    x, w, sizes = normal(0, (16, 24), jnp.bfloat16), normal(1, (2, 24, 16)), jnp.asarray([8, 8])

    def both(x, w):
        rows = kernels.fp8_activations(x)
        product = functools.partial(kernels.fp8_grouped_matmul, group_sizes=sizes)
        return product(rows, w) + product(rows, 2 * w)

    y, pull = jax.vjp(both, x, w)
    dx, dw = pull(y)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
    # Powers of two are not rounded.
    once, pull = jax.vjp(functools.partial(kernels.fp8_grouped_matmul, group_sizes=sizes), x, w)
    np.testing.assert_allclose(y.astype(float), 3 * once.astype(float), rtol=0.01, atol=0.01)
    np.testing.assert_allclose(dw, 3 * pull(y)[1], rtol=0.02, atol=0.02 * float(abs(dw).max()))
