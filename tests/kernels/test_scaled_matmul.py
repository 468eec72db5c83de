"""The product of 8-bit numbers with scales, one suite for every implementation, and the gradients of fp8's."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import choice
from kernels.gemm import api, pallas_tpu
from kernels.gemm.blocks import Blocks, scaled_blocks, up
from kernels.tpu import GENERATIONS
from tests.kernels import formats64 as exact
from tests.kernels.comparison import normal

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
ROWS, K, N, SIDE = 40, 300, 200, 128
# Formats of x and w, the blocks of both, and whether w is stored [n, k]; x without a format is not scaled.
CASES = {
    "fp8 in blocks": ("e4m3", "e4m3", (1, SIDE), (SIDE, SIDE), False),
    "fp8 in blocks, transposed": ("e5m2", "e4m3", (1, SIDE), (SIDE, SIDE), True),
    "fp8, columns in blocks": ("e4m3", "e5m2", (1, SIDE), (SIDE, 1), False),
    "fp8 tensors": ("e4m3", "e4m3", None, None, True),
    "int8 in blocks": ("int8", "int8", (1, SIDE), (SIDE, SIDE), False),
    "int8 rows and columns": ("int8", "int8", (1, K), (K, 1), False),
    "int8 in wide blocks": ("int8", "int8", None, (2 * SIDE, 2 * SIDE), True),
    "bf16 and int8 in blocks": ("bfloat16", "int8", None, (SIDE, SIDE), True),
    "bf16 and int8 columns": ("bfloat16", "int8", None, (K, 1), False),
    "bf16 and fp8": ("bfloat16", "e4m3", None, (SIDE, SIDE), False),
    "f32 and int8": ("float32", "int8", None, (SIDE, SIDE), False),
}
# Combinations of what the others have, for the slow tests.
RARE = "fp8, columns in blocks", "int8 in wide blocks", "bf16 and int8 in blocks", "f32 and int8"


def uneven(seed, rows, columns):
    """Normal numbers of which every block, and every third row, needs another scale."""
    row, column = np.arange(rows)[:, None], np.arange(columns)
    return normal(seed, (rows, columns)) * np.exp2(3 * (row // SIDE) + 2 * (column // SIDE) + row % 3)


def small_blocks(monkeypatch, generation=None):
    """Several blocks of every axis, and two scales in each of k, on the machine's own or another generation's path."""
    monkeypatch.setattr(pallas_tpu, "scaled_blocks", lambda *_: Blocks(32, 2 * SIDE, 128, 2**24))
    monkeypatch.setattr(pallas_tpu, "current_generation", lambda: GENERATIONS.get(generation))


@functools.partial(jax.jit, static_argnums=(1, 2))
def rounded(x, name, block):
    """Values and scales, and the numbers that they are."""
    if name not in exact.TYPES:
        return (x.astype(name), None), x.astype(name).astype(jnp.float32)
    found = kernels.quantize(x, exact.TYPES[name], block)
    return found, kernels.dequantize(found, block)


def operands(case, x, w):
    """What `scaled_matmul` is given, and its numbers in f64."""
    x_format, w_format, x_block, w_block, transposed = CASES[case]
    w_block = w_block[::-1] if transposed and w_block else w_block
    (x, x_scales), wide_x = rounded(x, x_format, x_block)
    (w, w_scales), wide_w = rounded(w.T if transposed else w, w_format, w_block)
    wide_x, wide_w = np.asarray(wide_x, np.float64), np.asarray(wide_w, np.float64)
    return (x, w, x_scales, w_scales), wide_x, wide_w.T if transposed else wide_w


def multiply(case, implementation, arguments, **options):
    block = CASES[case][3]
    options |= {"transposed": CASES[case][4], "block_size": max(block) if block and max(block) < K else SIDE}
    interpret = True if implementation == "pallas_tpu" else None
    run = functools.partial(kernels.scaled_matmul, implementation=implementation, interpret=interpret, **options)
    return jax.jit(run)(*arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [pytest.param(it, marks=pytest.mark.slow) if it in RARE else it for it in CASES])
def test_the_product_of_scaled_numbers(case, implementation, monkeypatch):
    """Within f32's rounding of the scaled numbers' own product, and within the formats' of what was quantised."""
    small_blocks(monkeypatch)
    check_product(case, implementation)


def check_product(case, implementation):
    x, w = uneven(0, ROWS, K), uneven(1, K, N)
    arguments, wide_x, wide_w = operands(case, x, w)
    y = multiply(case, implementation, arguments, dtype=jnp.float32)
    nothing = np.zeros_like
    bound = exact.product_error(wide_x, nothing(wide_x), wide_w, nothing(wide_w))
    exact.assert_within(y, wide_x @ wide_w, bound, f"{implementation}, {case}")
    x_format, w_format, x_block, w_block, _ = CASES[case]
    x_error = exact.error(x, x_format, x_block) if x_format in exact.TYPES else np.abs(wide_x - np.asarray(x, float))
    bound = exact.product_error(x, x_error, w, exact.error(w, w_format, w_block))
    exact.assert_within(y, np.asarray(x, np.float64) @ np.asarray(w, np.float64), bound, f"{implementation}, {case}")


@pytest.mark.parametrize(
    ("case", "generation"),
    [
        ("fp8 in blocks, transposed", "v3"),
        ("int8 rows and columns", "v3"),
        ("fp8 in blocks, transposed", "v4"),
        ("fp8 in blocks", "v6e"),
        pytest.param("int8 in blocks", "v4", marks=pytest.mark.slow),
        pytest.param("fp8 in blocks, transposed", "7x", marks=pytest.mark.slow),
        pytest.param("bf16 and fp8", "7x", marks=pytest.mark.slow),
    ],
)
def test_generations_that_widen_multiply_the_same_numbers(case, generation, monkeypatch):
    """v4 has no 8-bit product, v3 no bf16 product either; v6e and 7x scale first."""
    small_blocks(monkeypatch, generation)
    check_product(case, "pallas_tpu")


def test_the_result_is_rounded_once(monkeypatch):
    small_blocks(monkeypatch)
    arguments, *_ = operands("fp8 in blocks", uneven(0, ROWS, K), uneven(1, K, N))
    wide = multiply("fp8 in blocks", "pallas_tpu", arguments, dtype=jnp.float32)
    narrow = multiply("fp8 in blocks", "pallas_tpu", arguments)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_no_number_stays_in_its_row_or_columns(implementation, monkeypatch):
    """And an outlier of 1e4, a row of zeros and a row of denormals harm nobody else's row."""
    small_blocks(monkeypatch)
    x, w = normal(0, (ROWS, K)), normal(1, (K, N))
    x = x.at[0, 5].set(jnp.nan).at[1, 299].set(-jnp.inf).at[2, 130].set(1e4).at[3].set(0).at[4].set(1e-40)
    w = w.at[0, 150].set(jnp.inf)
    arguments, wide_x, wide_w = operands("fp8 in blocks", x, w)
    y = np.asarray(multiply("fp8 in blocks", implementation, arguments, dtype=jnp.float32))
    assert np.isnan(y[:2]).all() and np.isnan(y[:, 128:]).all() and np.isfinite(y[2:, :128]).all()
    assert (y[3:5, :128] == 0).all()
    seen, columns = wide_x[2:], wide_w[:, :128]
    bound = exact.product_error(seen, np.zeros_like(seen), columns, np.zeros_like(columns))
    exact.assert_within(y[2:, :128], seen @ columns, bound, implementation)


@pytest.mark.parametrize("generation", GENERATIONS.values(), ids=lambda it: it.name)
def test_blocks_cut_no_scale_and_fit(generation):
    for depth, (k, n) in itertools.product((128, 256, 384), ((768, 3072), (3072, 768), (4096, 16384), (100, 100))):
        sizes = scaled_blocks(generation, 8192, k, n, depth, (1, 1, 2))
        sizes.check(depth)
        assert up(k, depth) % sizes.k == up(n, 128) % sizes.n == 8192 % sizes.rows == 0
        copied = sizes.rows * (sizes.k + 2 * sizes.n) + sizes.k * sizes.n
        assert 2 * copied + 4 * sizes.rows * sizes.n < sizes.vmem < generation.vmem


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 0, 8), (8, 8, 0)])
def test_nothing_to_multiply(shape, implementation):
    rows, k, n = shape
    x, w, scale = jnp.ones((rows, k), jnp.int8), jnp.ones((k, n), jnp.int8), jnp.ones((1, 1))
    y = jax.jit(functools.partial(kernels.scaled_matmul, implementation=implementation))(x, w, scale, scale)
    np.testing.assert_array_equal(y, np.zeros((rows, n)))


def fp8_and_gradients(x, w, g, **options):
    y, pull = jax.vjp(functools.partial(kernels.fp8_gemm, **options), x, w)
    dx, dw = pull(g)
    return {"y": y, "dx": dx, "dw": dw}


def check_gradients(x, w, g, transposed, block_size, **options):
    """fp8's product and gradients against those in f64 of what was not rounded, within the formats' bounds."""
    run = jax.jit(functools.partial(fp8_and_gradients, transposed=transposed, block_size=block_size, **options))
    got = run(x, w.T if transposed else w, g)
    x, w, g = (np.asarray(it, np.float64) for it in (x, w, g))
    side = block_size
    row, square, column = ((1, side), (side, side), (side, 1)) if side else (None, None, None)
    x_error, w_error = exact.error(x, "e4m3", row), exact.error(w, "e4m3", square)
    # Scaled again along rows, what is too small for its new neighbours goes.
    again = x_error + exact.smallest(np.abs(x) + x_error, "e4m3", column)
    want = {"y": x @ w, "dx": g @ w.T, "dw": x.T @ g}
    bounds = {
        "y": exact.product_error(x, x_error, w, w_error),
        "dx": exact.product_error(g, exact.error(g, "e5m2", row), w.T, w_error.T),
        "dw": exact.product_error(x.T, again.T, g, exact.error(g, "e5m2", column)),
    }
    for name, value in got.items():
        value = value.T if name == "dw" and transposed else value
        exact.assert_within(value, want[name], bounds[name], f"{name} {options}")


@pytest.mark.parametrize("implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla", "pallas_tpu"])
@pytest.mark.parametrize(
    ("transposed", "block_size"), [(False, 128), pytest.param(True, 128, marks=pytest.mark.slow), (True, None)]
)
def test_fp8_gradients(transposed, block_size, implementation, monkeypatch):
    small_blocks(monkeypatch)
    options = {"implementation": implementation, "interpret": True if implementation == "pallas_tpu" else None}
    x, w, g = uneven(0, 150, 160), uneven(1, 160, 136), uneven(2, 150, 136) * 1e-3
    check_gradients(x.at[3, 5].set(1e4), w, g, transposed, block_size, **options)


@given(data=st.data())
@settings(max_examples=10)
def test_fp8_gradients_of_any_numbers(data):
    """Of every magnitude, zeros among them; small blocks, which the TPU kernel has not."""
    seeds, scale = st.integers(0, 2**32 - 1), st.integers(-20, 20)
    rng = np.random.default_rng(data.draw(seeds))

    def matrix(*shape):
        spread = rng.normal(size=shape) * np.exp2(rng.integers(-12, 12, shape) + data.draw(scale))
        # And one that is beyond f32's normal numbers, and one of 1e4.
        spread, (small, large) = spread * rng.integers(0, 2, shape), rng.integers(0, spread.size, 2)
        spread.flat[small], spread.flat[large] = 1e-40, 1e4
        return jnp.asarray(spread, jnp.float32)

    check_gradients(matrix(7, 20), matrix(20, 9), matrix(7, 9), False, 8, implementation="xla")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_no_number_is_seen_in_its_gradients(value):
    """In y and dx in its own row and no other; in dw, which is a sum over rows, all that has a part in it."""
    x, w, g = normal(0, (16, 24)).at[3, 5].set(value), normal(1, (24, 12)), normal(2, (16, 12)).at[6, 2].set(value)
    found = jax.jit(lambda *a: fp8_and_gradients(*a, block_size=8, implementation="xla"))(x, w, g)
    y, dx, dw = (np.isnan(found[name]) for name in ("y", "dx", "dw"))
    assert y[3].all() and not np.delete(y, 3, axis=0).any()
    assert dx[6].all() and not np.delete(dx, 6, axis=0).any()
    assert dw[5].all() and dw[:, 2].all()


def test_gradients_reach_as_far_as_e5m2():
    """Numbers 2^-22 of the largest in their block, which nothing else is added to, keep their two digits."""
    x, w = jnp.ones((8, 16)).at[0].set(0), normal(1, (16, 8)).at[:, 0].set(0)
    check_gradients(x, w, jnp.full((8, 8), 2.0**-22).at[0].set(1).at[:, 0].set(1), False, 8, implementation="xla")


def test_the_automatic_choice_and_types():
    """A batch of any rank; results in the types of the inputs, what is saved in fp8."""
    x, w = normal(0, (2, 3, 16), jnp.bfloat16), normal(1, (16, 8))
    result = jax.jit(fp8_and_gradients)(x, w, jnp.ones((2, 3, 8), jnp.bfloat16))
    assert {name: it.dtype for name, it in result.items()} == {"y": x.dtype, "dx": x.dtype, "dw": w.dtype}
    assert result["dx"].shape == x.shape


def test_what_is_rounded_once_serves_all_its_products():
    """Kept once, in fp8, for two products; their gradients flow on together, in the type of what was rounded."""
    x, weights, g = normal(0, (64, 256), jnp.bfloat16), normal(1, (2, 256, 128)), normal(2, (64, 128), jnp.bfloat16)
    product = functools.partial(kernels.fp8_gemm, implementation="xla")

    def both(x, weights):
        x = kernels.fp8_activations(jnp.sin(x))
        return product(x, weights[0]) + product(x, weights[1])

    y, pull = jax.vjp(both, x, weights)
    dx, dw = pull(g)
    _, alone = zip(*(jax.vjp(lambda x, w: product(jnp.sin(x), w), x, w) for w in weights), strict=True)
    (dx0, dw0), (dx1, dw1) = (pull(g) for pull in alone)
    np.testing.assert_array_equal(dw, jnp.stack([dw0, dw1]))
    # Added before the slope of what x went through, and not after.
    np.testing.assert_allclose(dx.astype(float), (dx0 + dx1).astype(float), rtol=0.02, atol=0.02 * float(abs(dx).max()))
    assert y.dtype == dx.dtype == x.dtype and dw.dtype == weights.dtype
    saved = [
        (it.shape, it.dtype) for it in jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(both, *a)[1], x, weights))
    ]
    assert saved.count(((64, 256), jnp.dtype(jnp.float8_e4m3fn))) == 1


@pytest.mark.parametrize(
    ("where", "dtype", "block", "said"),
    [
        ("cpu", "e4m3", 128, "XLA on cpu has no product of fp8: numbers are held in 8 bits and widened"),
        ("cpu", "int8", None, "XLA on cpu has no product of int8: "),
        ("gpu", "e5m2", 128, "XLA on gpu, with scales of blocks, has no product of fp8: "),
        ("gpu", "e4m3", None, None),
        ("v3", "e4m3", 128, "TPU v3 has no product of fp8: "),
        ("v4", "int8", None, "TPU v4 has no product of int8: "),
        ("v5e", "e4m3", None, None),
        ("7x", "int8", 128, None),
    ],
)
def test_what_has_no_product_of_8_bits_says_so_once(where, dtype, block, said, monkeypatch, caplog):
    """And only where nobody chose the implementation."""
    monkeypatch.setattr(api, "current_generation", lambda: GENERATIONS.get(where))
    monkeypatch.setattr(jax, "default_backend", lambda: where)
    choice.warn_once.cache_clear()
    x, w = (jnp.ones(shape).astype(exact.TYPES[dtype]) for shape in ((8, 256), (256, 16)))
    scales = (jnp.ones((1, 1)),) * 2 if block is None else (jnp.ones((8, 2)), jnp.ones((2, 1)))
    for implementation in (None, None, "reference"):
        jax.eval_shape(functools.partial(api.scaled_matmul, implementation=implementation), x, w, *scales)
    warned = [it.message for it in caplog.records if it.levelname == "WARNING"]
    assert len(warned) == (said is not None) and all(it.startswith(f"scaled_matmul: {said}") for it in warned)


def test_errors():
    ones, scale = functools.partial(jnp.ones, dtype=jnp.int8), jnp.ones((1, 1))
    product = functools.partial(kernels.scaled_matmul, implementation="pallas_tpu")
    with pytest.raises(ValueError, match=r"scaled_matmul: w has shape \[5, 4\], expected \[4, n\]"):
        product(ones((3, 4)), ones((5, 4)), scale, scale)
    with pytest.raises(
        ValueError, match=r"x_scales.shape\[1\]=3 must be one of 1, 2 for 200 numbers .* block_size=128"
    ):
        product(ones((3, 200)), ones((200, 4)), jnp.ones((3, 3)), scale)
    with pytest.raises(ValueError, match=r"w_scales.shape\[0\]=200 must be one of 1, 2 for"):
        product(ones((3, 200)), ones((200, 4)), scale, jnp.ones((200, 4)))
    with pytest.raises(ValueError, match=r"x.dtype=float8_e5m2 must be one of int8 for w int8"):
        product(ones((3, 4)).astype(jnp.float8_e5m2), ones((4, 4)), scale, scale)
    with pytest.raises(ValueError, match=r"x.dtype=int8 must be one of bfloat16, float32 for w int8; pass x_scales"):
        product(ones((3, 4)), ones((4, 4)), None, scale)
    with pytest.raises(ValueError, match=r"w.dtype=float32 must be one of float8_e4m3fn, float8_e5m2, int8"):
        product(ones((3, 4)), jnp.ones((4, 4)), scale, scale)
    with pytest.raises(ValueError, match="block_size=64 must be a multiple of 128 for implementation 'pallas_tpu'"):
        product(ones((3, 200)), ones((200, 4)), jnp.ones((3, 4)), scale, block_size=64)
    with pytest.raises(ValueError, match="block size k=128 must be a multiple of 256"):
        Blocks(32, 128, 128, 0).check(256)
