"""The TPU kernels under the interpreter that finds races, and planted faults that it has to find.

It simulates memory and copies: what is read before it is written is not a number, reads beyond an array raise, and a
read or write that no copy's end or order of steps separates from another core's write is a race.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import kernels
from kernels.flash_attention import pallas_forward
from kernels.grouped_matmul import blocks
from kernels.moe_dispatch import pallas_tpu as moves
from tests.kernels import test_flash_attention as attention
from tests.kernels import test_scaled_matmul as scaled
from tests.kernels.comparison import assert_close, normal

CORES = (1, 2)
RACE = "RACE DETECTED"


def interpreter(cores=1):
    return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores, uninitialized_memory="nan")


def races(run, capfd):
    """Whether the interpreter finds a race, and what is computed: that of jax 0.10 prints it, later ones raise it."""
    try:
        out = jax.block_until_ready(run())
    except jax.errors.JaxRuntimeError as error:
        assert RACE in str(error)
        return True, None
    return RACE in capfd.readouterr().out, out


@pytest.fixture(autouse=True)
def reset():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def attend(implementation, interpret=None):
    """Result, log-sum-exp and gradients of two rows of two packed documents, several blocks each, with dropout."""
    q, k, v = (normal(seed, (2, 20, heads, 8)) for seed, heads in enumerate((2, 1, 1)))
    segments = jnp.asarray([[0] * 7 + [1] * 13, [0] * 16 + [1] * 4])

    @jax.jit
    def run(q, k, v):
        def loss(q, k, v):
            out, lse = kernels.flash_attention(
                q, k, v, segment_ids=segments, dropout_rate=0.3, dropout_key=jax.random.key(1), return_lse=True,
                implementation=implementation, interpret=interpret,
            )  # fmt: skip
            return jnp.sum(out * normal(4, out.shape)) + jnp.sum(jnp.sin(lse)), (out, lse)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    return run(q, k, v)


def small_attention(monkeypatch):
    attention.shrink(monkeypatch, "pallas_tpu")


def experts(implementation, interpret=None):
    """Dispatch, a product and combine, with all their gradients."""
    x, up = normal(0, (20, 128)), normal(1, (3, 128, 128))
    index = jnp.asarray(np.random.default_rng(2).integers(0, 3, (20, 2)), jnp.int32)
    names = {"implementation": implementation, "interpret": interpret}

    @jax.jit
    def run(x, up, weights):
        def loss(x, up, weights):
            rows, plan = kernels.moe_dispatch(x, index, 3, row_alignment=8, **names)
            rows = kernels.grouped_matmul(rows, up, plan.group_sizes, row_alignment=8, **names)
            return jnp.sum(kernels.moe_combine(rows, plan, weights, **names) * normal(4, x.shape))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(x, up, weights)

    return run(x, up, normal(3, (20, 2)))


def small_experts(monkeypatch):
    monkeypatch.setattr(blocks, "ROWS", (16,))


def fp8(implementation, interpret=None):
    """A product of fp8 and both its gradients, several blocks of every axis."""
    x, w, g = normal(0, (40, 300)), normal(1, (300, 200)), normal(2, (40, 200))

    @jax.jit
    def run(x, w, g):
        product = functools.partial(kernels.fp8_gemm, implementation=implementation, interpret=interpret)
        y, pull = jax.vjp(product, x, w)
        return y, pull(g)

    return run(x, w, g)


OPERATIONS = {
    "attention": (attend, small_attention),
    "experts": (experts, small_experts),
    "fp8": (fp8, scaled.small_blocks),
}


@pytest.mark.slow
@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_race_and_nothing_read_that_is_not_there(operation, cores, monkeypatch, capfd):
    run, shrink = OPERATIONS[operation]
    shrink(monkeypatch)
    got = run("pallas_tpu", interpreter(cores))
    assert_close(got, run("reference"), jnp.float32, operation)
    assert RACE not in capfd.readouterr().out


@pytest.mark.slow
def test_memory_that_nobody_initialised_is_found(monkeypatch):
    """The forward pass of attention without its first step's zeros."""
    small_attention(monkeypatch)
    monkeypatch.setattr(pallas_forward, "FIRST", 0)
    out, _ = attend("pallas_tpu", interpreter())[1]
    assert not np.isfinite(out).all()


def copied(x, own):
    """x by two cores, each of which writes its `own` half, or both of them the first."""

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...]

    block = (x.shape[0] // 2, x.shape[1])
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(2,),
        in_specs=[pl.BlockSpec(block, lambda i: (i, 0))],
        out_specs=pl.BlockSpec(block, lambda i: (i if own else 0, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpreter(2),
    )(x)


@pytest.mark.parametrize("own", [True, False])
def test_a_race_is_found(own, capfd):
    raced, _ = races(lambda: copied(normal(0, (16, 128)), own), capfd)
    assert raced == (not own)


def test_a_read_out_of_bounds_is_found(monkeypatch):
    """Dispatch of a token that is not there."""
    right = moves.token_of_row
    monkeypatch.setattr(moves, "token_of_row", lambda plan: right(plan) + 1)
    index = jnp.asarray(np.arange(20).reshape(20, 1) % 3, jnp.int32)
    with pytest.raises(Exception, match=r"[Oo]ut-of-bounds"):
        jax.block_until_ready(
            kernels.moe_dispatch(
                normal(0, (20, 128)), index, 3, row_alignment=8, implementation="pallas_tpu", interpret=interpreter()
            )
        )


def doubled(x, waits):
    """Twice x, by a kernel that copies it and `waits` for the copy or not."""

    def kernel(x_ref, out_ref, copy_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, copy_ref, semaphore)
        copy.start()
        if waits:
            copy.wait()
        out_ref[...] = 2 * copy_ref[...]
        if not waits:
            copy.wait()

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=interpreter(),
    )(x)


@pytest.mark.parametrize("waits", [True, False])
def test_a_missing_wait_is_found(waits, capfd):
    """No kernel here copies by itself; one that does and reads too early is seen."""
    x = normal(0, (8, 128))
    raced, out = races(lambda: doubled(x, waits), capfd)
    assert raced == (not waits)
    if waits:
        np.testing.assert_array_equal(out, 2 * x)
