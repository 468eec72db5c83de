"""Schedules, decay by declaration, and AdamW against its formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import small
from vishwamai_eqx import optim
from vishwamai_eqx.architecture import build
from vishwamai_eqx.config import OptimConfig

CONFIG = OptimConfig(steps=100, warmup_steps=10, learning_rate=1.0, decay_share=0.2, final_learning_rate_share=0.1)


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("cosine", {0: 0, 5: 0.5, 10: 1, 55: 0.55, 100: 0.1}),
        ("wsd", {0: 0, 5: 0.5, 10: 1, 80: 1, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedules(schedule, points):
    rate = optim.learning_rate(dataclasses.replace(CONFIG, schedule=schedule))
    for step, expected in points.items():
        np.testing.assert_allclose(rate(step), expected, atol=1e-6)


@pytest.mark.parametrize(("steps", "warmup"), [(60, 40), (60, 59), (20, 3)])
def test_a_short_run_ends_at_its_last_rate_too(steps, warmup):
    settings = {"schedule": "wsd", "steps": steps, "warmup_steps": warmup, "decay_share": 0.4}
    rate = optim.learning_rate(dataclasses.replace(CONFIG, **settings))
    np.testing.assert_allclose([rate(warmup), rate(steps)], [1.0, 0.1], atol=1e-6)


def test_adamw_step_by_hand():
    config = dataclasses.replace(CONFIG, warmup_steps=0, schedule="wsd", weight_decay=0.1, eps=1e-8)
    model = build(small(num_layers=1), "float32", jax.random.key(0))
    transform = optim.optimizer(config)
    gradients = jax.tree.map(lambda leaf: jnp.sign(leaf) + 0.5, model)
    updates, _ = transform.update(gradients, transform.init(model), model)
    # The first step of Adam is the sign of the gradient; matrices decay besides, norms and routers do not.
    sign = jax.tree.map(jnp.sign, gradients)
    np.testing.assert_allclose(
        updates.embedding.weight, -sign.embedding.weight - 0.1 * model.embedding.weight, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(updates.norm.scale, -sign.norm.scale, rtol=1e-4)
    np.testing.assert_allclose(updates.blocks.experts.router.weight, -sign.blocks.experts.router.weight, rtol=1e-4)


def test_clip():
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped = optim.clip(gradients, jnp.array(5.0), 1.0)
    np.testing.assert_allclose(clipped["b"], 0.8, rtol=1e-6)
    np.testing.assert_allclose(optim.clip(gradients, jnp.array(5.0), 10.0)["a"], 3.0)
