"""The products of 8-bit numbers through the TPU compiler itself, for generations that are not here."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kernels
from kernels import topology
from kernels.tpu import GENERATIONS

aval = jax.ShapeDtypeStruct


def fp8_gradients(x, w, **options):
    """The product of fp8 and both its gradients, of the squared result."""

    def loss(x, w):
        return jnp.sum(kernels.fp8_gemm(x, w, **options).astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1))(x, w)


def scaled_products(text):
    return len(set(re.findall(r"(gemm_scaled[.\d]*) = ", text)))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_compiles(generation):
    """Training in fp8 with blocks, int8 with a scale a row and a column, and weights alone in 8 bits."""

    def program(x, w, x_int8, w_int8, rows, columns):
        dynamic = kernels.scaled_matmul(x_int8, w_int8, rows, columns)
        weights = kernels.scaled_matmul(x, w_int8, None, columns)
        return fp8_gradients(x, w, transposed=True), dynamic, weights

    shapes = ((256, 384), jnp.bfloat16), ((256, 384), jnp.float32), ((256, 384), jnp.int8), ((384, 256), jnp.int8)
    avals = [aval(*it) for it in (*shapes, ((256, 1), jnp.float32), ((1, 256), jnp.float32))]
    text = topology.lower_for(generation, program, *avals).compile().as_text()
    # Forward, both gradients and the other two.
    assert scaled_products(text) == 5


def test_inside_shard_map_with_replicated_weights():
    """Sizes that no block divides, on the generation that widens most."""
    mesh = topology.mesh("v3", (8,))

    def local(x, w):
        return fp8_gradients(x, w, block_size=None)

    step = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P()), check_vma=True)
    avals = [
        aval(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((8 * 100, 200), P("data")), ((200, 300), P()))
    ]
    assert scaled_products(topology.lower_for("v3", step, *avals, on=mesh).compile().as_text()) == 3


def test_a_long_sum_of_many_parts_fits_small_memory():
    """The gradient of a narrow weight over many rows: 32 parts of k, of which v3 holds what it adds up."""
    x, w = aval((256, 4096), jnp.float8_e5m2), aval((4096, 768), jnp.float8_e4m3fn)
    scales = aval((256, 32), jnp.float32), aval((32, 768), jnp.float32)
    text = topology.lower_for("v3", kernels.scaled_matmul, x, w, *scales).compile().as_text()
    assert scaled_products(text) == 1
