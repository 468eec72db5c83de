"""Rows to their experts' devices and back: both ways of sending them against plain NumPy, whatever the load."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import kernels
from vishwamai_eqx import exchange
from vishwamai_eqx.mesh import make_mesh

TOKENS, CHOICES, EXPERTS, WIDTH = 6, 2, 4, 3


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What the collective is documented to do, of which CPUs have none: row by row, all devices at once."""
    everything = (operand, input_offsets, send_sizes, output_offsets)
    operands, starts, sizes, targets = (jax.lax.all_gather(x, axis_name) for x in everything)
    here, slots = jax.lax.axis_index(axis_name), starts.shape[1] // jax.lax.axis_size(axis_name)
    for sender in range(operands.shape[0]):
        for slot in range(slots):
            segment = here * slots + slot
            at = jnp.arange(output.shape[0]) - targets[sender, segment]
            # The receiver has to expect what the sender sends, or this one loses it, as a TPU would.
            size = jnp.minimum(sizes[sender, segment], recv_sizes[sender * slots + slot])
            source = jnp.clip(at + starts[sender, segment], 0, operand.shape[0] - 1)
            output = jnp.where(((at >= 0) & (at < size))[:, None], operands[sender][source], output)
    return output


@pytest.fixture(autouse=True)
def ragged_on_cpu(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)


@functools.cache
def there_and_back(devices, implementation):
    def run(x, index, g):
        rows, plan = kernels.moe_dispatch(x, index, EXPERTS, row_alignment=2)
        way = exchange.route(plan, implementation)
        delivered, pull = jax.vjp(way.deliver, rows)
        back, pull_back = jax.vjp(way.collect, delivered)
        g_rows, g_delivered = g[: rows.shape[0]], g[: delivered.shape[0]]
        gradients = pull(g_delivered)[0], pull_back(g_rows)[0]
        return rows, plan, delivered, back, way.group_sizes, *gradients, way.collect(g_delivered), way.deliver(g_rows)

    mesh = make_mesh({"expert": devices})
    on = P("expert")
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(on, on, on), out_specs=on, check_vma=True))


def choices(devices, seed, load):
    """Different experts for each token: even, all on one device, or of few devices."""
    rng = np.random.default_rng(seed)
    index = np.argsort(rng.random((devices * TOKENS, EXPERTS)), axis=1)
    if load == "one device":
        index = index[:, :1] * 0 + np.array([3, 2])
    if load == "one sender":
        index[TOKENS:] = [0, 1, 2, 3]
    return index[:, :CHOICES].astype(np.int32)


@pytest.mark.parametrize("implementation", ["padded", "ragged"])
@pytest.mark.parametrize("devices", [1, 2, 4])
@given(seed=st.integers(0, 1000), load=st.sampled_from(["even", "one device", "one sender"]))
@example(seed=0, load="one device")
def test_every_row_arrives_where_its_expert_is_and_comes_back(devices, implementation, seed, load):
    index = choices(devices, seed, load)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(devices * TOKENS, WIDTH)).astype(np.float32)
    g = rng.normal(size=(devices * 100, WIDTH)).astype(np.float32)
    rows, plan, delivered, back, sizes, *gradients = there_and_back(devices, implementation)(x, index, g)

    here, groups = EXPERTS // devices, np.reshape(sizes, (devices, -1))
    for device, result in enumerate(np.split(np.asarray(delivered), devices)):
        start = 0
        for expert in range(here):
            # In the order of the devices, and of each device's tokens.
            expected = x[np.any(index == device * here + expert, axis=1)]
            np.testing.assert_array_equal(result[start : start + len(expected)], expected)
            end = start + groups[device, expert]
            assert end >= start + len(expected)
            np.testing.assert_array_equal(result[start + len(expected) : end], 0)
            start = end
        np.testing.assert_array_equal(result[start:], 0)
    assert np.asarray(plan.counts).sum() == index.size
    np.testing.assert_array_equal(back, rows)
    # The gradient of either is the other.
    np.testing.assert_array_equal(gradients[0], gradients[2])
    np.testing.assert_array_equal(gradients[1], gradients[3])


def test_an_unknown_implementation_is_refused():
    _, plan = kernels.moe_dispatch(jnp.ones((4, 3)), jnp.zeros((4, 1), jnp.int32), 2)
    with pytest.raises(ValueError, match="expert_exchange: implementation='mega' is not one of 'padded', 'ragged'"):
        exchange.route(plan, "mega")
