"""The flash attention kernels through the TPU compiler itself, for generations that are not here."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kernels
from kernels import topology
from kernels.tpu import GENERATIONS

HEADS, KV_HEADS, LENGTH = 4, 2, 1024


def gradients(q, k, v, segment_ids, **arguments):
    """Of the squared result and log-sum-exp, so that nothing of either pass can be left out."""

    def loss(q, k, v):
        out, lse = kernels.flash_attention(q, k, v, segment_ids=segment_ids, return_lse=True, **arguments)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(lse**2)

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


def operands(dtype, head_dim, batch=1, length=LENGTH):
    shapes = [(batch, length, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), jax.ShapeDtypeStruct((batch, length), jnp.int32)


def assert_compiles(generation, fn, *avals, on=None):
    text = topology.lower_for(generation, fn, *avals, on=on).compile().as_text()
    assert "flash_attention_fwd" in text and "flash_attention_bwd" in text


# v2 and v3 have no bf16 products and 16 MiB of vector memory; the others follow in the whole table below.
@pytest.mark.parametrize("generation", ["v3", "v5e"])
def test_both_passes_compile(generation):
    assert_compiles(generation, gradients, *operands(jnp.bfloat16, 64))


def test_a_tpu_chooses_the_kernels_by_itself_inside_shard_map():
    """A replicated k among sharded others, with varying axes checked, dropout, and every kind of mask at once."""
    mesh = topology.mesh("v3", (4, 2), ("data", "model"))
    arguments = {"window": 700, "softcap": 20.0, "dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
    rows, shared, both = P("data"), P(None, None, "model"), P("data", None, "model")
    placed = (both, shared, both, rows, rows, P())
    step = jax.shard_map(
        lambda q, k, v, ids, offset, mask: gradients(
            q, k, v, ids, q_offset=offset, kv_lengths=offset + LENGTH, mask=mask, **arguments
        ),
        mesh=mesh,
        in_specs=placed,
        out_specs=(both, shared, both),
        check_vma=True,
    )
    q, k, v, ids = operands(jnp.bfloat16, 64, batch=4)
    k = jax.ShapeDtypeStruct((1, *k.shape[1:]), k.dtype)
    offset, mask = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((LENGTH, LENGTH), jnp.bool_)
    avals = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip((q, k, v, ids, offset, mask), placed, strict=True)
    ]
    assert_compiles("v3", step, *avals, on=mesh)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda dtype: jnp.dtype(dtype).name)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_compiles_every_type_and_width(generation, dtype, head_dim):
    """Inside shard_map, with varying axes checked, which adds to what compiles alone."""
    mesh, rows = topology.mesh(generation, (2,)), P("data")
    step = jax.shard_map(gradients, mesh=mesh, in_specs=(rows,) * 4, out_specs=(rows,) * 3, check_vma=True)
    avals = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, rows))
        for x in operands(dtype, head_dim, batch=2)
    ]
    assert_compiles(generation, step, *avals, on=mesh)


@pytest.mark.parametrize("generation", ["v3", "v4", "v5e", "v6e"])
def test_the_longest_single_block_compiles(generation):
    assert_compiles(generation, gradients, *operands(jnp.bfloat16, 128, length=2048))


@pytest.mark.parametrize("generation", ["v3", "v5e"])
def test_several_blocks_of_every_kind_compile(generation):
    assert_compiles(generation, gradients, *operands(jnp.bfloat16, 128, length=4096))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_dropout_and_wide_heads_compile(generation):
    arguments = {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
    assert_compiles(generation, functools.partial(gradients, **arguments), *operands(jnp.bfloat16, 256))
