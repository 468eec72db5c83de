"""The product of activations and weights: every form against f64 NumPy and the plain form's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from tests.kernels.comparison import assert_close, normal

SHAPES = {"sequence": (3, 10, 24), "rows": (30, 24), "vector": (24,), "deep": (2, 3, 5, 24)}


def value_and_gradients(x, w, **arguments):
    def loss(x, w):
        y = kernels.gemm(x, w, **arguments)
        return jnp.sum(y.astype(jnp.float32) * normal(5, y.shape)), y

    (_, y), (dx, dw) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, w)
    return {"y": y, "dx": dx, "dw": dw}


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("shape", "transposed", "dtypes"),
    [
        ("sequence", False, ("float32", "float32")),
        ("sequence", False, ("bfloat16", "float32")),
        ("sequence", True, ("bfloat16", "bfloat16")),
        ("rows", True, ("float32", "float32")),
        ("vector", False, ("bfloat16", "float32")),
        ("deep", True, ("bfloat16", "float32")),
    ],
)
def test_value_and_gradients(shape, transposed, dtypes, implementation):
    x = normal(0, SHAPES[shape], dtypes[0])
    w = normal(1, (40, 24) if transposed else (24, 40), dtypes[1])
    result = value_and_gradients(x, w, transposed=transposed, implementation=implementation)
    assert [result[name].dtype for name in ("y", "dx", "dw")] == [x.dtype, x.dtype, w.dtype]
    x64, w64 = (np.asarray(a.astype(dtypes[0]), np.float64) for a in (x, w))
    matrix = w64.T if transposed else w64
    y = x64 @ matrix
    g = np.asarray(normal(5, y.shape), np.float64)
    dw = np.einsum("rk,rn->kn", x64.reshape(-1, 24), g.reshape(-1, 40))
    want = {"y": y, "dx": g @ matrix.T, "dw": dw.T if transposed else dw}
    assert_close(result, want, dtypes[0], f"{implementation} {shape}")


def test_an_f32_weight_has_an_unrounded_gradient():
    """Products of bf16 numbers are exact in f32, and their sum stays there."""
    x, g = normal(0, (2, 64, 8), jnp.bfloat16), normal(1, (2, 64, 8), jnp.bfloat16)
    w = normal(2, (8, 8))
    _, pullback = jax.vjp(lambda w: kernels.gemm(x, w, implementation="xla"), w)
    exact = np.einsum("bsk,bsn->kn", np.asarray(x, np.float64), np.asarray(g, np.float64))
    assert_close(pullback(g)[0], exact, jnp.float32, "dw")


def test_a_transposed_weight_and_gradient_compile():
    """XLA's CPU library has no bf16 product whose f32 result is transposed at once."""
    x, w = normal(0, (4, 64, 32), jnp.bfloat16), normal(1, (48, 32))

    def loss(x, w):
        return jnp.sum(kernels.gemm(x, w.T, implementation="xla").astype(jnp.float32) ** 2)

    dx, dw = jax.jit(lambda x, w: jax.tree.map(lambda a: a.T, jax.grad(loss, argnums=(0, 1))(x, w)))(x, w)
    want = value_and_gradients(x, w, transposed=True, implementation="xla")
    assert dx.T.shape == want["dx"].shape and dw.T.shape == want["dw"].shape


def test_f64():
    with jax.enable_x64(True):
        x, w = normal(0, (2, 7, 24), jnp.float64), normal(1, (24, 10), jnp.float64)
        forms = [value_and_gradients(x, w, implementation=name) for name in ("xla", "reference")]
        assert forms[0]["dw"].dtype == jnp.float64
        assert_close(*forms, jnp.float64, "f64")


def test_vmap():
    x, w = normal(0, (3, 2, 5, 24)), normal(1, (3, 24, 10))
    run = jax.jit(jax.vmap(lambda x, w: kernels.gemm(x, w, implementation="xla")))
    assert_close(run(x, w), jnp.einsum("ebsk,ekn->ebsn", x, w), jnp.float32, "vmap")


def test_errors():
    x = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"w has shape \[5, 4\], expected \[4, n\] .* pass transposed=True"):
        kernels.gemm(x, jnp.ones((5, 4)))
    with pytest.raises(ValueError, match=r"implementation='xlb' is not one of 'reference', 'xla'; use 'xla'"):
        kernels.gemm(x, jnp.ones((4, 5)), implementation="xlb")
