"""Dispatch, grouped products and combine: every form against `lax.ragged_dot`, plain indexing, and each other."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import kernels
from kernels.grouped_matmul import blocks, xla
from kernels.moe_dispatch.plan import padded_rows
from tests.kernels.comparison import assert_close, normal

K, N = 12, 20
SIZES = {
    "even": [8, 8, 8, 8],
    "ragged": [3, 17, 1, 11],
    "empty groups": [0, 19, 0, 13],
    "one takes all": [0, 0, 32, 0],
    "rows beyond": [5, 0, 9, 4],
    "nothing": [0, 0, 0, 0],
}
IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(xla, "BLOCK", 8)
    monkeypatch.setattr(blocks, "ROWS", (16,))


def named(implementation):
    """The implementation, interpreted if it is written for TPUs."""
    return {"implementation": implementation, "interpret": implementation == "pallas_tpu" or None}


@functools.partial(jax.jit, static_argnames=("implementation", "transposed", "row_alignment"))
def grouped(lhs, rhs, sizes, implementation, transposed=False, row_alignment=1):
    def loss(lhs, rhs):
        out = kernels.grouped_matmul(
            lhs, rhs, sizes, **named(implementation), row_alignment=row_alignment, transposed=transposed
        )
        return jnp.sum(out.astype(jnp.float32) * normal(4, out.shape)), out

    gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(lhs, rhs)
    return out, *gradients


@jax.jit
def ragged_dot(lhs, rhs, sizes):
    """`lax.ragged_dot` and its gradients in f32, zeros in the rows beyond, which it leaves undefined."""
    inside = (np.arange(lhs.shape[0]) < jnp.sum(sizes))[:, None]

    def loss(lhs, rhs):
        out = jnp.where(inside, lax.ragged_dot(lhs, rhs, sizes, precision="highest"), 0)
        return jnp.sum(out * normal(4, out.shape)), out

    lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(lhs, rhs)
    return out, *gradients


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SIZES)
def test_grouped_matmul_matches_ragged_dot(name, implementation, dtype):
    lhs, rhs, sizes = normal(0, (32, K), dtype), normal(1, (4, K, N), dtype), jnp.asarray(SIZES[name])
    out, d_lhs, d_rhs = grouped(lhs, rhs, sizes, implementation)
    assert (out.dtype, d_lhs.dtype, d_rhs.dtype) == (dtype,) * 3
    want = ragged_dot(lhs, rhs, sizes)
    assert_close((out, d_lhs, d_rhs), want, dtype, name)
    turned = grouped(lhs, rhs.swapaxes(1, 2), sizes, implementation, transposed=True)
    assert_close((*turned[:2], turned[2].swapaxes(1, 2)), want, dtype, f"{name}, transposed")


def test_aligned_groups_take_no_copy_and_give_the_same():
    sizes = jnp.asarray([16, 0, 8, 8])
    lhs, rhs = normal(0, (40, K)), normal(1, (4, K, N))
    aligned = grouped(lhs, rhs, sizes, "xla", row_alignment=8)
    assert_close(aligned, grouped(lhs, rhs, sizes, "reference"), jnp.float32, "aligned")
    aligned_code = str(jax.make_jaxpr(lambda *a: kernels.grouped_matmul(*a, "xla", row_alignment=8))(lhs, rhs, sizes))
    assert "scatter" not in aligned_code
    assert "scatter" in str(jax.make_jaxpr(lambda *a: kernels.grouped_matmul(*a, "xla"))(lhs, rhs, sizes))


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), beyond=st.integers(0, 20))
def test_any_sizes(sizes, beyond):
    rows = 64
    sizes = [*sizes, 0, 0, 0, 0][:5]
    total = 0
    for index, size in enumerate(sizes):
        sizes[index] = min(size, rows - beyond - total)
        total += sizes[index]
    lhs, rhs = normal(0, (rows, K)), normal(1, (5, K, N))
    want = grouped(lhs, rhs, jnp.asarray(sizes), "reference")
    for name in IMPLEMENTATIONS[1:]:
        assert_close(grouped(lhs, rhs, jnp.asarray(sizes), name), want, jnp.float32, f"{name}: {sizes} of {rows}")


def routing(tokens, experts, choices, seed=0):
    scores = np.random.default_rng(seed).gumbel(size=(tokens, experts)) - np.log(np.arange(1, experts + 1))
    return jnp.asarray(np.argsort(-scores, axis=1)[:, :choices], jnp.int32)


dispatch = jax.jit(kernels.moe_dispatch, static_argnames=("num_experts", "row_alignment", "implementation"))


@given(tokens=st.sampled_from([1, 24]), choices=st.just(2), alignment=st.sampled_from([1, 8]), data=st.data())
def test_a_plan_sends_every_choice_to_a_row_of_its_own(tokens, choices, alignment, data):
    experts = 4
    chosen = data.draw(st.lists(st.integers(0, experts - 1), min_size=tokens * choices, max_size=tokens * choices))
    index = jnp.asarray(chosen, jnp.int32).reshape(tokens, choices)
    x = normal(0, (tokens, 6))
    rows, plan = dispatch(x, index, num_experts=experts, row_alignment=alignment, implementation="xla")
    counts = np.bincount(chosen, minlength=experts)
    np.testing.assert_array_equal(plan.counts, counts)
    np.testing.assert_array_equal(plan.group_sizes, -(-counts // alignment) * alignment)
    assert rows.shape[0] == padded_rows(tokens * choices, experts, alignment) >= np.sum(plan.group_sizes)
    starts = np.cumsum(plan.group_sizes) - plan.group_sizes
    position = np.asarray(plan.position)
    assert len(np.unique(position)) == tokens * choices
    # Row starts[e] + r is the r-th choice of expert e, in the order of the tokens.
    for expert in range(experts):
        mine = position[np.asarray(index) == expert]
        np.testing.assert_array_equal(mine, starts[expert] + np.arange(counts[expert]))
    expected = np.zeros(rows.shape, np.float32)
    expected[position] = np.asarray(x)[:, None]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(plan.source[position.reshape(-1)], np.arange(tokens * choices))


@functools.partial(jax.jit, static_argnames=("implementation", "alignment"))
def layer(x, weights, gate, up, down, index, implementation, alignment=8):
    def loss(x, weights, gate, up, down):
        rows, plan = kernels.moe_dispatch(x, index, gate.shape[0], row_alignment=alignment, **named(implementation))
        product = functools.partial(
            kernels.grouped_matmul,
            group_sizes=plan.group_sizes,
            row_alignment=plan.row_alignment,
            **named(implementation),
        )
        hidden = product(jax.nn.silu(product(rows, gate)) * product(rows, up), down)
        y = kernels.moe_combine(hidden, plan, weights, **named(implementation))
        return jnp.sum(y.astype(jnp.float32) * normal(6, y.shape)), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)(x, weights, gate, up, down)
    return y, gradients


def layer_inputs(dtype=jnp.float32, tokens=24):
    weights = [normal(seed, shape, dtype) / 4 for seed, shape in ((1, (4, K, N)), (2, (4, K, N)), (3, (4, N, K)))]
    return normal(0, (tokens, K), dtype), jax.nn.softmax(normal(5, (tokens, 2))), *weights


@jax.jit
def dense_layer(x, weights, gate, up, down, index):
    """Every expert for every token, then the chosen ones: no dispatch at all."""

    def loss(x, weights, gate, up, down):
        hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up)
        every = jnp.einsum("tef,efd->ted", hidden, down)
        y = jnp.einsum("tc,tcd->td", weights, jnp.take_along_axis(every, index[:, :, None], axis=1))
        return jnp.sum(y * normal(6, y.shape)), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)(x, weights, gate, up, down)
    return y, gradients


@pytest.mark.parametrize("load", ["zipf", "one takes all", "one expert twice"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_whole_layer_matches_every_expert_for_every_token(implementation, load):
    index = routing(24, 4, 2)
    index = {"zipf": index, "one takes all": index * 0 + jnp.asarray([2, 0]), "one expert twice": index * 0 + 1}[load]
    operands = layer_inputs()
    want = dense_layer(*operands, index)
    for alignment in (1, 8):
        assert_close(layer(*operands, index, implementation, alignment), want, jnp.float32, f"{load} {alignment}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_whole_layer_in_bf16(implementation):
    index = routing(24, 4, 2)
    operands = layer_inputs(jnp.bfloat16)
    y, gradients = layer(*operands, index, implementation)
    assert y.dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
    want = dense_layer(*(x.astype(jnp.float32) for x in operands), index)
    assert_close((y, gradients), want, jnp.bfloat16, "layer")


def test_the_whole_layer_in_f64():
    with jax.enable_x64(True):
        operands = [x.astype(jnp.float64) for x in layer_inputs()]
        index = routing(24, 4, 2)
        assert_close(layer(*operands, index, "xla"), dense_layer(*operands, index), jnp.float64, "layer")


def test_under_checkpoint_scan_and_vmap():
    index = routing(24, 4, 2)
    x, weights, gate, _, down = layer_inputs()

    def block(x, _):
        rows, plan = kernels.moe_dispatch(x, index, 4, row_alignment=8, implementation="xla")
        hidden = kernels.grouped_matmul(rows, gate, plan.group_sizes, "xla", row_alignment=8)
        hidden = kernels.grouped_matmul(hidden, down, plan.group_sizes, "xla", row_alignment=8)
        return x + kernels.moe_combine(hidden, plan, weights, implementation="xla"), None

    def scanned(x):
        return jnp.sum(lax.scan(jax.checkpoint(block), x, None, length=2)[0] ** 2)

    def unrolled(x):
        return jnp.sum(block(block(x, None)[0], None)[0] ** 2)

    assert_close(jax.jit(jax.grad(scanned))(x), jax.jit(jax.grad(unrolled))(x), jnp.float32, "gradient")
    both = jax.jit(jax.vmap(lambda x: block(x, None)[0]))(jnp.stack([x, 2 * x]))
    assert_close(both[0], jax.jit(lambda x: block(x, None)[0])(x), jnp.float32, "vmap")


def test_errors():
    x, index = jnp.ones((4, 3)), jnp.zeros((4, 2), jnp.int32)
    with pytest.raises(ValueError, match="row_alignment=0 must be at least 1"):
        kernels.moe_dispatch(x, index, 2, row_alignment=0)
    with pytest.raises(ValueError, match="num_experts=0 must be at least 1"):
        kernels.moe_dispatch(x, index, 0)
    with pytest.raises(ValueError, match=r"rhs has shape \[2, 5, 3\], expected \[groups, 3, n\]"):
        kernels.grouped_matmul(x, jnp.ones((2, 5, 3)), jnp.asarray([2, 2]))
    with pytest.raises(ValueError, match="implementation='mega' is not one of"):
        kernels.grouped_matmul(x, jnp.ones((2, 3, 5)), jnp.asarray([2, 2]), "mega")
    with pytest.raises(ValueError, match=r"group_sizes\[1\]=-1 must be at least 0"):
        kernels.grouped_matmul(x, jnp.ones((2, 3, 5)), jnp.asarray([2, -1]))
    with pytest.raises(ValueError, match=r"sum\(group_sizes\)=5 must be at most the 4 rows of lhs"):
        kernels.grouped_matmul(x, jnp.ones((2, 3, 5)), jnp.asarray([2, 3]))
    with pytest.raises(ValueError, match=r"interpret=True has no meaning for implementation 'xla'"):
        kernels.grouped_matmul(x, jnp.ones((2, 3, 5)), jnp.asarray([2, 2]), "xla", interpret=True)
    with pytest.raises(ValueError, match=r"lhs.dtype=float16 is not float32 or bfloat16"):
        kernels.grouped_matmul(x.astype(jnp.float16), jnp.ones((2, 3, 5)), jnp.asarray([2, 2]), "pallas_tpu")
    for bad in (-1, 2):
        with pytest.raises(ValueError, match=rf"expert_index\[3, 1\]={bad} must be in \[0, 2\)"):
            kernels.moe_dispatch(x, index.at[3, 1].set(bad), 2)
    with pytest.raises(ValueError, match="moe_dispatch: implementation='mega' is not one of"):
        kernels.moe_dispatch(x, index, 2, implementation="mega")
    rows, plan = kernels.moe_dispatch(x, index, 2)
    with pytest.raises(ValueError, match="moe_combine: implementation='mega' is not one of"):
        kernels.moe_combine(rows, plan, jnp.ones((4, 2)), implementation="mega")
    with pytest.raises(ValueError, match=r"x.dtype=float16 is not float32 or bfloat16"):
        kernels.moe_dispatch(x.astype(jnp.float16), index, 2, implementation="pallas_tpu")


def test_the_automatic_choice_is_logged_once(caplog):
    from kernels import choice

    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels"):
        for _ in range(2):
            kernels.gemm(jnp.ones((1, 2, 3)), jnp.ones((3, 4)))
    assert [record.getMessage() for record in caplog.records] == ["gemm: implementation 'xla', chosen automatically"]
