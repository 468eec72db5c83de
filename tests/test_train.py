"""The step: devices and microbatches cannot change it, and a run goes on where it stopped."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import train
from tests.small import random_batch, small
from vishwamai_eqx import optim, state
from vishwamai_eqx.config import Config
from vishwamai_eqx.mesh import make_mesh
from vishwamai_eqx.state import TrainState


def run(config: Config, devices: int, steps: int, dtype: str) -> tuple[list[train.Metrics], TrainState]:
    """Some steps on so many devices; the metrics of each and the last state."""
    sizes = {"data": devices}
    mesh, transform = make_mesh(sizes), optim.optimizer(config.optim)
    abstract = state.abstract_state(config.model, dtype, transform)
    specs = state.placement(abstract, sizes, transform)
    shardings = state.shardings(mesh, specs)
    current = state.initialise(config.model, dtype, transform, 0, shardings)
    if dtype == "float64":
        current = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, current)
    step = train.make_step(config, mesh, specs, transform)
    metrics = []
    for n in range(steps):
        batch = random_batch(config.optim.batch_size, 16, n)
        parts = jax.tree.map(lambda rows: rows.reshape(config.optim.microbatches, -1, rows.shape[-1]), batch)
        current, more = step(current, jax.device_put(parts, NamedSharding(mesh, train.MICROBATCHES)))
        metrics.append(jax.device_get(more))
    return metrics, jax.device_get(current)


def worst(a: object, b: object) -> float:
    """The largest difference between two trees, relative to the largest number of each pair of leaves."""
    differences = jax.tree.map(
        lambda x, y: np.max(np.abs(x - y), initial=0) / max(np.max(np.abs(x), initial=0), 1e-30), a, b
    )
    return max(jax.tree.leaves(differences))


# Every loss term is large enough here for a mistake in it to show, and the clip bites.
WEIGHTS = {"balance_loss_weight": 0.3, "router_z_loss_weight": 0.1, "clip_norm": 0.5}
one = functools.cache(lambda dtype, steps, **model: run(small(optim=WEIGHTS, **model), 1, steps, dtype))


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("model", [{}, {"tie_embeddings": False, "remat": "full", "dropout_rate": 0.2}])
@pytest.mark.parametrize("devices", [1, 2])
def test_meshes_and_microbatches_do_not_change_the_losses(devices, model, microbatches):
    devices = {1: 1, 2: 8 if microbatches == 1 else 4}[devices]
    if devices == microbatches == 1:
        pytest.skip("that is the run compared with")
    with jax.enable_x64(True):
        expected, _ = one("float64", 20, **model)
        found, _ = run(small(optim={**WEIGHTS, "microbatches": microbatches}, **model), devices, 20, "float64")
        assert worst(expected, found) < 1e-9


@pytest.mark.parametrize(("devices", "microbatches"), [(8, 1), (1, 4), (2, 4)])
def test_first_gradient_in_f32(devices, microbatches):
    _, expected = one("float32", 1)
    _, found = run(small(optim={**WEIGHTS, "microbatches": microbatches}), devices, 1, "float32")
    # After one step, Adam's first moment is the clipped gradient times 1 - beta1.
    assert worst(expected.opt_state[0].mu, found.opt_state[0].mu) < 1e-5


def extra_psum_of_the_loss(model, specs, hidden, batch, *, right=train.token_loss):
    return jax.lax.psum(jax.lax.pcast(right(model, specs, hidden, batch), "data", to="varying"), "data")


def norm_without_psum(gradients, specs):
    return jax.lax.pmax(optax.tree.norm(gradients), "data")


def norm_that_counts_copies_again(gradients, specs):
    return jnp.sqrt(jax.lax.psum(optax.tree.norm(gradients) ** 2, "data"))


def gradient_of_a_copy_summed_by_hand(gradients, norm, limit, *, right=optim.clip):
    copied = jax.tree.map(lambda g: g * jax.lax.axis_size("data"), gradients.norm)
    return right(eqx.tree_at(lambda model: model.norm, gradients, copied), norm, limit)


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (train, "token_loss", extra_psum_of_the_loss),
        (optim, "global_norm", norm_without_psum),
        (optim, "global_norm", norm_that_counts_copies_again),
        (optim, "clip", gradient_of_a_copy_summed_by_hand),
    ],
)
def test_a_planted_psum_is_seen(monkeypatch, owner, name, fault):
    with jax.enable_x64(True):
        _, expected = one("float64", 1)
        monkeypatch.setattr(owner, name, fault)
        _, found = run(small(optim=WEIGHTS), 8, 1, "float64")
    assert worst(expected.opt_state[0].mu, found.opt_state[0].mu) > 1e-3


def test_loss_starts_near_that_of_a_guess():
    config = small(vocab_size=2048, hidden_size=128)
    metrics, _ = run(config, 1, 1, "float32")
    assert abs(metrics[0].loss / np.log(2048) - 1) < 0.02
