"""The experts' kernels through the TPU compiler itself, for generations that are not here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kernels
from kernels import topology
from kernels.tpu import GENERATIONS

NAMES = ("grouped_matmul_fwd", "grouped_matmul_dlhs", "grouped_matmul_drhs")
MOVES = ("moe_dispatch_rows", "moe_dispatch_sum", "moe_dispatch_dot")
ROWS, GROUPS = 600, 4
aval = jax.ShapeDtypeStruct


def product(lhs, rhs, sizes, transposed=False, row_alignment=1):
    """The product and both gradients of the squared result, so that nothing of either pass can be left out."""

    def loss(lhs, rhs):
        out = kernels.grouped_matmul(lhs, rhs, sizes, transposed=transposed, row_alignment=row_alignment)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1))(lhs, rhs)


def layer(x, index, scores, up, down):
    """Dispatch, two products, combine, and the gradients of all of it."""

    def loss(x, scores, up, down):
        rows, plan = kernels.moe_dispatch(x, index, GROUPS)
        rows = kernels.grouped_matmul(rows, up, plan.group_sizes, row_alignment=plan.row_alignment)
        rows = kernels.grouped_matmul(rows, down, plan.group_sizes, row_alignment=plan.row_alignment, transposed=True)
        return jnp.sum(kernels.moe_combine(rows, plan, jax.nn.softmax(scores)).astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(x, scores, up, down)


def layer_avals(dtype, tokens=256):
    weight = aval((GROUPS, 128, 256), dtype)
    return aval((tokens, 128), dtype), aval((tokens, 2), jnp.int32), aval((tokens, 2), jnp.float32), weight, weight


def assert_compiles(generation, names, fn, *avals, on=None):
    text = topology.lower_for(generation, fn, *avals, on=on).compile().as_text()
    missing = [name for name in names if name not in text]
    assert not missing, f"{generation}: the program has no {missing}"


# v2 and v3 have no bf16 product, 16 MiB of vector memory and 16 KiB of scalar memory; the slow table has every other.
@pytest.mark.parametrize("generation", ["v3", "v5e"])
def test_a_layer_of_experts_compiles(generation):
    assert_compiles(generation, NAMES + MOVES, layer, *layer_avals(jnp.bfloat16))


def assert_a_sharded_layer_compiles(generation, devices, dtype):
    """Each device's own tokens, and experts that every device has."""
    mesh = topology.mesh(generation, (devices,))
    sharded, shared = P("data"), P()
    placed = (sharded, sharded, sharded, shared, shared)

    def local(*operands):
        value, gradients = layer(*operands)
        return jax.lax.psum(value, "data"), gradients

    step = jax.shard_map(
        local, mesh=mesh, in_specs=placed, out_specs=(P(), (sharded, sharded, shared, shared)), check_vma=True
    )
    avals = [
        aval(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(layer_avals(dtype, devices * 128), placed, strict=True)
    ]
    assert_compiles(generation, NAMES + MOVES, step, *avals, on=mesh)


def test_inside_shard_map_with_replicated_experts():
    assert_a_sharded_layer_compiles("v3", 8, jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda dtype: jnp.dtype(dtype).name)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_compiles_every_type(generation, dtype):
    assert_a_sharded_layer_compiles(generation, 2, dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda dtype: jnp.dtype(dtype).name)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_sizes_that_no_block_divides_compile(generation, dtype, transposed):
    """Neither rows, k nor n is a multiple of anything, and k is too long for one block."""
    k, n = 5000, 200
    rhs = aval((GROUPS, n, k) if transposed else (GROUPS, k, n), dtype)

    def fn(lhs, rhs, sizes):
        return product(lhs, rhs, sizes, transposed)

    assert_compiles(generation, NAMES, fn, aval((ROWS, k), dtype), rhs, aval((GROUPS,), jnp.int32))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_base_presets_experts_compile(generation):
    """f32 master weights of bf16 activations, whose gradient is f32."""
    lhs, rhs = aval((8192, 768), jnp.bfloat16), aval((8, 768, 3072), jnp.float32)

    def fn(lhs, rhs, sizes):
        return product(lhs, rhs, sizes, row_alignment=256)

    assert_compiles(generation, NAMES, fn, lhs, rhs, aval((8,), jnp.int32))
