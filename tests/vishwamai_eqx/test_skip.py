"""Steps that are not taken: every device decides alike, nothing of them stays, and what was wrong is told."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import train
from tests.small import random_batch, small
from vishwamai_eqx import data, nonfinite, optim, scaling, skip, state
from vishwamai_eqx.config import GuardConfig
from vishwamai_eqx.mesh import make_mesh
from vishwamai_eqx.skip import Skips, Watch

MESH = make_mesh({"data": 8})
GUARD = GuardConfig()


def watch(taken: int, skipped: int = 0) -> Watch:
    return Watch(jnp.float32(2.0), jnp.float32(0.5), jnp.int32(taken), jnp.int32(skipped))


def judged(loss, norm, before=None, guard=GUARD):
    """What the devices, each with its own loss and norm, make of them: a row a device."""

    def one(loss, norm):
        take, after = skip.judge(before or watch(skip.WINDOW), loss[0], norm[0], guard)
        return jax.tree.map(lambda x: x[None], (take, after))

    # Unchecked: that the devices should all have the same numbers is what is not so here.
    body = jax.shard_map(one, mesh=MESH, in_specs=(P("data"), P("data")), out_specs=P("data"), check_vma=False)
    return jax.device_get(jax.jit(body)(*(np.broadcast_to(np.float32(x), (8,)) for x in (loss, norm))))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_what_one_device_sees_is_skipped_by_all(value, where):
    odd = np.ones(8, np.float32)
    odd[3] = value
    take, after = judged(*((odd, 0.5) if where == "loss" else (2.0, odd)), before=watch(3, skipped=1))
    assert not take.any() and (after.skipped == 2).all() and (after.taken == 3).all()
    assert (after.loss == 2).all() and (after.grad_norm == 0.5).all()


@pytest.mark.parametrize(
    ("loss", "norm", "taken", "settings", "take"),
    [
        (5.9, 4.9, 50, {}, True),
        (6.1, 0.5, 50, {}, False),
        (2.0, 5.1, 50, {}, False),
        (6.1, 5.1, 49, {}, True),
        (6.1, 0.5, 50, {"loss_spike": 0.0}, True),
        (2.0, 5.1, 50, {"grad_spike": 0.0}, True),
        (2.0, 5.1, 50, {"grad_spike": 11.0}, True),
    ],
)
def test_spikes(loss, norm, taken, settings, take):
    found, after = judged(loss, norm, watch(taken, skipped=1), dataclasses.replace(GUARD, **settings))
    assert (found == take).all()
    assert (after.skipped == (0 if take else 2)).all() and (after.taken == taken + take).all()
    assert (after.loss[0] == 2) == (not take or loss == 2)


def test_means_are_plain_and_then_move_on():
    losses = np.random.default_rng(0).uniform(1, 2, skip.WINDOW + 1).astype(np.float32)

    def all_of_them(losses):
        def one(now, loss):
            _, after = skip.judge(now, loss, loss, GUARD)
            return after, after.loss

        return jax.lax.scan(one, skip.begin(), losses)

    body = jax.shard_map(all_of_them, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=True)
    last, means = jax.device_get(jax.jit(body)(losses))
    np.testing.assert_allclose(means[:-1], np.cumsum(losses[:-1]) / np.arange(1, skip.WINDOW + 1), rtol=1e-5)
    np.testing.assert_allclose(means[-1], means[-2] + (losses[-1] - means[-2]) / skip.WINDOW, rtol=1e-6)
    assert last.taken == skip.WINDOW + 1 and last.skipped == 0


@jax.custom_vjp
def spoil(x, spoilt):
    """x, whose gradient is NaN where `spoilt` says so."""
    return x


spoil.defvjp(lambda x, spoilt: (x, spoilt), lambda spoilt, g: (jnp.where(spoilt, jnp.nan, g), None))


def steps(monkeypatch, broken_model=None, spoilt_row=None):
    """Two steps of a small model on eight devices, the first of them poisoned; state and metrics before and after."""
    right = train.token_loss

    def token_loss(model, specs, hidden, batch):
        # The row with position 1000 in it lies on one device.
        return right(model, specs, spoil(hidden, (batch.positions == 1000).any()), batch)

    monkeypatch.setattr(train, "token_loss", token_loss)
    config = small()
    sizes, transform = {"data": 8}, optim.optimizer(config.optim)
    abstract = state.abstract_state(config, "float32", transform)
    specs = state.placement(abstract, sizes, transform)
    current = state.initialise(config, "float32", transform, state.shardings(MESH, specs))
    if broken_model is not None:
        current = eqx.tree_at(broken_model[0], current, replace_fn=broken_model[1])
    step = train.make_step(config, MESH, specs, transform)
    batches, states, metrics = [], [jax.device_get(current)], []
    for n in range(2):
        batch = random_batch(16, 16, n)
        if spoilt_row is not None and n == 0:
            batch.positions[spoilt_row, -1] = 1000
        parts = jax.tree.map(lambda rows: rows[None], batch)
        current, more = step(current, jax.device_put(parts, NamedSharding(MESH, train.MICROBATCHES)))
        batches.append(batch)
        states.append(jax.tree.map(lambda x: [np.asarray(part.data) for part in x.addressable_shards], current))
        metrics.append(jax.device_get(more))
    return batches, states, metrics


def test_a_nan_in_one_devices_gradient_is_skipped_by_all_and_recorded(monkeypatch):
    batches, (before, after, then), metrics = steps(monkeypatch, spoilt_row=7)
    # Every device still has the numbers that it had, of parameters and of moments.
    for old, shards in zip(jax.tree.leaves((before.model, before.opt_state)), _lists(after), strict=True):
        whole = sum(part.size for part in shards) == old.size
        assert all(np.isfinite(part).all() for part in shards)
        for part in [np.concatenate([s.ravel() for s in shards])] if whole and len(shards) > 1 else shards:
            assert np.array_equal(np.sort(part.ravel()), np.sort(old.ravel()))
    assert [int(x) for x in after.step] == [1] * 8 and [int(x) for x in after.watch.skipped] == [1] * 8
    # And the next step is taken by all.
    assert [int(x) for x in then.step] == [2] * 8 and [int(x) for x in then.watch.skipped] == [0] * 8
    # The first update's learning rate is 0, so it shows in the moments alone.
    assert all(np.any(part != 0) for part in then.opt_state[0].mu.norm.scale)

    events = []
    skips = Skips(2, lambda kind, message, step: events.append((kind, step, message)))
    assert [skips.too_many(n, more) for n, more in enumerate([*metrics, None], 1)] == [False] * 3
    ((kind, step, message),) = events
    assert (kind, step) == ("skipped", 1)
    assert f"batch {data.batch_hash(batches[0])}" in message
    assert "skipped, 1 in a row: the gradient of the final norm or head was the first that was not finite" in message


def _lists(after):
    return jax.tree.leaves((after.model, after.opt_state), is_leaf=lambda x: isinstance(x, list))


@pytest.mark.parametrize(
    ("where", "first"),
    [
        (lambda s: s.model.blocks.experts_norm.scale, "the output of layer 1"),
        (lambda s: s.model.embedding.weight, "the output of the embedding"),
        (lambda s: s.model.norm.scale, "the loss"),
    ],
)
def test_the_first_layer_that_was_not_finite(where, first, monkeypatch):
    def broken(leaf):
        return leaf.at[-1].set(jnp.inf) if leaf.ndim == 2 and leaf.shape[0] == 2 else leaf * jnp.inf

    _, _, metrics = steps(monkeypatch, broken_model=(where, broken))
    assert [int(more.watch.skipped) for more in metrics] == [1, 2]
    assert skip.reason(metrics[1]).startswith(f"{first} was the first that was not finite; loss nan")


def test_gradients_are_blamed_in_the_order_of_the_backward_pass():
    def first(*gradients):
        return nonfinite.first(nonfinite.Broken(jnp.zeros(3, int), jnp.array(gradients)), 1.0)

    assert first(0, 0, 0, 0) is None
    assert first(1, 0, 0, 0) == "the gradient of the embedding"
    assert first(1, 1, 0, 0) == "the gradient of layer 0"
    assert first(1, 8, 1, 0) == "the gradient of layer 1"
    assert first(1, 1, 1, 1) == "the gradient of the final norm or head"


def test_too_many_in_a_row_and_the_report():
    def metrics(skipped):
        broken = nonfinite.Broken(jnp.zeros(3, int), jnp.zeros(4, int))
        now = Watch(jnp.float32(2.0), jnp.float32(0.5), jnp.int32(50), jnp.int32(skipped))
        told = None, scaling.Told(None, None, None)
        return train.Metrics(*[jnp.float32(9.0)] * 5, jnp.int32(8), None, jnp.uint32([1, 2]), now, broken, *told)

    events = []
    skips = Skips(3, lambda kind, message, step: events.append(step))
    found = [skips.too_many(n, metrics(skipped)) for n, skipped in enumerate([0, 1, 2, 0, 1, 2, 3, 4, 0], 1)]
    # A step is looked at with the next one, and the one that was under way by then counts for nothing.
    assert found == [False] * 7 + [True, False]
    assert events == [2, 3, 5, 6, 7]
    report = skips.report().splitlines()
    assert len(report) == 5 and report[1].startswith("step 5: skipped, 1 in a row: a spike; loss 9 (mean 2)")
