"""The mixture layer over data, expert and model against one device, whatever the load."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.small import MIXED, worst
from vishwamai_eqx import exchange, mesh, moe
from vishwamai_eqx.config import BATCH_AXES
from vishwamai_eqx.mesh import gather, make_mesh, on_mesh, place, sum_over
from vishwamai_eqx.moe import MoE

WIDTH, FFN, EXPERTS = 16, 12, 4


def inputs(load: str, choices: int) -> tuple[MoE, jax.Array, jax.Array, jax.Array]:
    """A layer in f64, tokens, which of them are real, and the gradient of what it makes of them."""
    layer = MoE(WIDTH, FFN, EXPERTS, choices, key=jax.random.key(0))
    layer = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), layer)
    x, g = jax.random.normal(jax.random.key(1), (2, 8, 6, WIDTH), jnp.float64)
    real = (jax.random.uniform(jax.random.key(2), (8, 6)) < 0.8).astype(jnp.float64)
    if load == "one expert":
        # The last feature is a constant, by which the router prefers the last experts, the last one most.
        x = x.at[..., -1].set(1)
        router = layer.router.weight.at[-1].set(jnp.arange(EXPERTS) * 20.0)
        layer = eqx.tree_at(lambda layer: layer.router.weight, layer, router)
    return layer, x, real, g


def results(sizes: dict[str, int], layer: MoE, x, real, g):
    """Output, losses, and the gradients of the layer and its input, on a mesh of those sizes, with remat."""
    devices = make_mesh(sizes)
    specs, rows = place(layer, dict(devices.shape)), on_mesh(P(BATCH_AXES), devices)

    def loss(layer, x, real, g):
        def block(layer, x):
            return gather(layer, specs, jnp.float64)(x, real)

        y, metrics = jax.checkpoint(block)(layer, x)
        metrics = sum_over(metrics, *BATCH_AXES)
        terms = sum_over(jnp.sum(y * g), *BATCH_AXES), metrics.balance, metrics.z
        return terms[0] + 0.3 * terms[1] + 0.1 * terms[2], (y, terms, metrics.load)

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    out = (P(), (rows, P(), P())), (specs, rows)
    sharded = jax.shard_map(run, mesh=devices, in_specs=(specs, rows, rows, rows), out_specs=out, check_vma=True)
    return jax.device_get(jax.jit(sharded)(layer, x, real, g))


one = functools.cache(lambda load, choices: results({}, *inputs(load, choices)))


@pytest.mark.parametrize(("load", "choices"), [("router", 2), ("one expert", 1), ("one expert", 2)])
def test_a_mixed_mesh_changes_nothing(load, choices):
    with jax.enable_x64(True):
        expected, found = one(load, choices), results(MIXED, *inputs(load, choices))
        if load == "one expert":
            assert np.count_nonzero(expected[0][1][2]) == choices
        assert worst(expected, found) < 1e-9


def a_row_that_is_lost(rows, sizes, source, target, length, *, right=exchange.move):
    return right(rows, jnp.maximum(sizes - 1, 0), source, target, length)


def part_instead_of_sum(x, *axes, right=mesh.sum_over):
    """What the first device has, twice: of the right type, and the wrong number."""
    first = jnp.where(mesh.index("model") == 0, 2.0, 0.0)
    return right(x * first, *axes) if axes == ("model",) else right(x, *axes)


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [(exchange, "move", a_row_that_is_lost), (moe, "sum_over", part_instead_of_sum)],
)
def test_a_planted_fault_is_seen(monkeypatch, owner, name, fault):
    with jax.enable_x64(True):
        expected = one("router", 2)
        monkeypatch.setattr(owner, name, fault)
        found = results(MIXED, *inputs("router", 2))
    assert worst(expected[0], found[0]) > 1e-3
