"""The step: meshes and microbatches cannot change it, and planted faults do."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding

import train
from tests.small import MIXED, random_batch, rarely, small, worst
from vishwamai_eqx import evaluation, exchange, mesh, optim, state
from vishwamai_eqx.architecture import build
from vishwamai_eqx.config import Config
from vishwamai_eqx.mesh import make_mesh
from vishwamai_eqx.state import TrainState

Start = Callable[[TrainState], TrainState]


def run(
    config: Config, mesh: dict[str, int], steps: int, dtype: str, start: Start = lambda s: s
) -> tuple[list[train.Metrics], TrainState]:
    """Some steps on a mesh of those sizes; the metrics of each and the last state."""
    return jax.device_get(run_on_devices(config, mesh, steps, dtype, start))


def run_on_devices(
    config: Config, mesh: dict[str, int], steps: int, dtype: str, start: Start = lambda s: s
) -> tuple[list[train.Metrics], TrainState]:
    """The same where the state may be in several processes: it stays there."""
    devices, transform = make_mesh(mesh), optim.optimizer(config.optim)
    abstract = state.abstract_state(config, dtype, transform)
    specs = state.placement(abstract, dict(devices.shape), transform)
    shardings = state.shardings(devices, specs)
    current = start(state.initialise(config, dtype, transform, shardings))
    if dtype == "float64":
        current = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, current)
    step = train.make_step(config, devices, specs, transform)
    metrics = []
    for n in range(steps):
        batch = random_batch(config.optim.batch_size, 16, n)
        parts = jax.tree.map(lambda rows: rows.reshape(config.optim.microbatches, -1, rows.shape[-1]), batch)
        current, more = step(current, jax.device_put(parts, NamedSharding(devices, train.MICROBATCHES)))
        metrics.append(jax.device_get(more))
    return metrics, current


# Every loss term is large enough here for a mistake in it to show, and the clip bites. No share of the warm-up is a
# binary fraction, so that a learning rate of fewer digits would show too.
WEIGHTS = {"balance_loss_weight": 0.3, "router_z_loss_weight": 0.1, "clip_norm": 0.5}
WEIGHTS |= {"warmup_steps": 3, "learning_rate": 3e-2}
OTHERWISE = {"tie_embeddings": False, "remat": "full", "dropout_rate": 0.2}
# On four devices along `model`, each pair of them has one head for keys and values.
DENSE = {"num_experts": 1, "experts_per_token": 1}
one = functools.cache(lambda dtype, steps, **model: run(small(optim=WEIGHTS, **model), {}, steps, dtype))


@pytest.mark.parametrize(
    ("mesh", "microbatches", "model"),
    [
        rarely({}, 4, {}),
        ({}, 4, OTHERWISE),
        ({"data": 8}, 1, {}),
        rarely({"data": 8}, 1, OTHERWISE),
        rarely({"data": 4}, 4, OTHERWISE),
        rarely({"data": 4, "expert": 2}, 2, {}),
        rarely(MIXED, 1, {}),
        (MIXED, 4, OTHERWISE),
        rarely({"expert": 8}, 2, {}),
        rarely({"model": 4}, 4, {}),
        rarely({"data": 2, "model": 4}, 1, OTHERWISE),
        rarely({"replica": 2, "data": 2, "model": 2}, 1, {}),
        ({"data": 2, "model": 4}, 2, DENSE),
    ],
    ids=str,
)
def test_meshes_and_microbatches_do_not_change_the_losses(mesh, microbatches, model):
    with jax.enable_x64(True):
        expected, _ = one("float64", 20, **model)
        found, _ = run(small(optim={**WEIGHTS, "microbatches": microbatches}, **model), mesh, 20, "float64")
        assert worst(expected, found) < 1e-9


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [
        ({"data": 8}, 1),
        ({}, 4),
        rarely({"data": 2}, 4),
        rarely({"data": 4, "expert": 2}, 1),
        (MIXED, 1),
        rarely({"expert": 8}, 1),
        rarely({"model": 4}, 1),
        rarely({"data": 2, "model": 4}, 1),
    ],
    ids=str,
)
def test_first_gradient_in_f32(mesh, microbatches):
    (before,), expected = one("float32", 1)
    (after,), found = run(small(optim={**WEIGHTS, "microbatches": microbatches}), mesh, 1, "float32")
    # After one step, Adam's first moment is the clipped gradient times 1 - beta1, and its scale is in the norm.
    assert before.grad_norm > WEIGHTS["clip_norm"]
    assert worst((before.grad_norm, expected.opt_state[0].mu), (after.grad_norm, found.opt_state[0].mu)) < 1e-5


@pytest.mark.parametrize("sizes", [{"data": 8}, MIXED], ids=str)
def test_held_out_loss_is_the_same_on_every_mesh(sizes):
    model, batch = build(small(), "float32", jax.random.key(0)), random_batch(16, 16, 0)

    def held_out(sizes):
        devices = make_mesh(sizes)
        specs = mesh.place(model, dict(devices.shape))
        here = jax.device_put((model, batch), state.shardings(devices, (specs, type(batch)(*[evaluation.ROWS] * 4))))
        return jax.device_get(evaluation.make_evaluate(train.token_loss, devices, specs)(*here))

    nats, tokens = held_out(sizes)
    expected, count = held_out({})
    assert tokens == count == (batch.segment_ids > 0).sum()
    assert nats / tokens == pytest.approx(np.log(96), rel=0.05)
    np.testing.assert_allclose(nats, expected, rtol=1e-6)


def to_one_expert(current: TrainState) -> TrainState:
    """A constant feature in front of the router, by which it prefers the last expert."""
    experts = current.model.blocks.experts
    bias = current.model.blocks.experts_norm.bias.at[:, 0].set(20)
    router = experts.router.weight.at[:, 0, :].set(jnp.arange(experts.gate.shape[1], dtype=jnp.float32))
    where = lambda s: (s.model.blocks.experts_norm.bias, s.model.blocks.experts.router.weight)  # noqa: E731
    return eqx.tree_at(where, current, (bias, router))


def test_all_tokens_to_one_expert():
    config = small(optim=WEIGHTS, experts_per_token=1)
    with jax.enable_x64(True):
        expected, _ = run(config, {}, 3, "float64", to_one_expert)
        found, _ = run(config, MIXED, 3, "float64", to_one_expert)
    for metrics in expected:
        np.testing.assert_array_equal(metrics.load, [[0] * 7 + [1]] * 2)
    assert worst(expected, found) < 1e-9


def extra_psum_of_the_loss(model, specs, hidden, batch, *, right=train.token_loss):
    return jax.lax.psum(jax.lax.pcast(right(model, specs, hidden, batch), "data", to="varying"), "data")


def norm_without_psum(squares, specs):
    return jax.lax.pmax(jnp.sqrt(optax.tree.sum(squares)), "data")


def norm_that_counts_copies_again(squares, specs):
    return jnp.sqrt(jax.lax.psum(optax.tree.sum(squares), "data"))


def gradient_of_a_copy_summed_by_hand(gradients, norm, limit, *, right=optim.clip):
    copied = jax.tree.map(lambda g: g * jax.lax.axis_size("data"), gradients.norm)
    return right(eqx.tree_at(lambda model: model.norm, gradients, copied), norm, limit)


def extra_psum_over_model(x, *axes, right=mesh.sum_over):
    once = right(x, *axes)
    return right(jax.tree.map(lambda leaf: mesh.vary(leaf, *axes), once), *axes) if axes == ("model",) else once


def gather_of_the_wrong_axis(shard, dimension, axes, dtype, *, right=mesh.gathered):
    return right(shard, dimension, {("data",): ("expert",), ("data", "expert"): ("expert", "data")}[axes], dtype)


def a_row_that_is_lost(rows, sizes, source, target, length, *, right=exchange.move):
    return right(rows, jnp.maximum(sizes - 1, 0), source, target, length)


@pytest.mark.parametrize(
    ("sizes", "owner", "name", "fault"),
    [
        ({"data": 8}, train, "token_loss", extra_psum_of_the_loss),
        ({"data": 8}, optim, "global_norm", norm_without_psum),
        rarely({"data": 8}, optim, "global_norm", norm_that_counts_copies_again),
        rarely({"data": 8}, optim, "clip", gradient_of_a_copy_summed_by_hand),
        (MIXED, mesh, "sum_over", extra_psum_over_model),
        rarely(MIXED, mesh, "gathered", gather_of_the_wrong_axis),
        (MIXED, exchange, "move", a_row_that_is_lost),
    ],
)
def test_a_planted_fault_is_seen(monkeypatch, sizes, owner, name, fault):
    with jax.enable_x64(True):
        _, expected = one("float64", 1)
        monkeypatch.setattr(owner, name, fault)
        _, found = run(small(optim=WEIGHTS), sizes, 1, "float64")
    assert worst(expected.opt_state[0].mu, found.opt_state[0].mu) > 1e-3


def test_a_missing_pmax_is_refused(monkeypatch):
    """Each device would shift its logits by its own largest, and the types say so."""
    monkeypatch.setattr(mesh, "max_over", lambda x, *axes: x)
    with pytest.raises(Exception, match=r"(?s)varying|V:\(.*model"):
        run(small(optim=WEIGHTS), MIXED, 1, "float32")


@pytest.mark.slow
def test_the_tpu_kernels_train_as_the_references_do(monkeypatch):
    """Attention, dispatch and grouped products as Pallas kernels, interpreted, inside the step with its gradients."""
    small_run = functools.partial(small, optim={"batch_size": 4}, dropout_rate=0.1)
    expected, _ = run(small_run(attention="reference", experts="reference"), {}, 3, "float32")
    # The interpreter mixes numbers that vary over the mesh with its own that do not; on one device nothing hangs on it.
    checked = jax.shard_map
    monkeypatch.setattr(jax, "shard_map", lambda *a, **options: checked(*a, **{**options, "check_vma": False}))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        found, _ = run(small_run(attention="pallas_tpu", experts="pallas_tpu"), {}, 3, "float32")
    losses = [[float(it.loss) for it in metrics] for metrics in (expected, found)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[0][0] != losses[0][2]
