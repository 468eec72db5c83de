"""Dropout in attention: the same elements whoever computes them, at the right rate, without structure."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels.flash_attention import dropout
from tests.kernels.comparison import assert_close, normal

KEY = jax.random.key(11)
RATE = 0.25


def kept(key=KEY, rate=RATE, batch=2, heads=3, queries=128, keys=160):
    axes = [jnp.arange(n).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate((batch, heads))]
    query, key_index = jnp.arange(queries)[:, None], jnp.arange(keys)
    return np.asarray(jax.jit(dropout.keep, static_argnums=1)(jax.random.key_data(key), rate, *axes, query, key_index))


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.5, 0.9])
def test_rate(rate):
    mask = kept(rate=rate)
    # Four standard deviations of a binomial share.
    assert abs(mask.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / mask.size)


def test_no_structure():
    """No row, column, head or batch row is like another or itself shifted, and none has another rate."""
    mask = kept(batch=2, heads=3, queries=256, keys=256)
    deviation = (mask - (1 - RATE)) / np.sqrt(RATE * (1 - RATE))
    for axis in (2, 3):
        assert np.abs(deviation.mean(axis=axis)).max() < 6 / np.sqrt(256)
    for axis in range(4):
        for shift in range(1, min(9, mask.shape[axis])):
            correlation = np.mean(deviation * np.roll(deviation, shift, axis))
            assert abs(correlation) < 5 / np.sqrt(mask.size), (axis, shift)
    rows = deviation.reshape(-1, 256)
    overlap = rows @ rows.T / 256 - np.eye(len(rows))
    assert np.abs(overlap).max() < 7 / np.sqrt(256)
    # Sums over the corners of rectangles find masks that are a function of the row plus one of the column.
    corners = deviation[..., :128, :128] * deviation[..., 128:, :128]
    corners = corners * deviation[..., :128, 128:] * deviation[..., 128:, 128:]
    assert abs(corners.mean()) < 5 / np.sqrt(corners.size)


def test_keys_are_independent():
    first, second = kept(jax.random.key(0)), kept(jax.random.key(1))
    assert abs(np.mean(first == second) - (RATE**2 + (1 - RATE) ** 2)) < 0.01


@functools.partial(jax.jit, static_argnames="implementation")
def attend(q, k, v, implementation="xla", **arguments):
    interpret = implementation == "pallas_tpu" or None
    return kernels.flash_attention(
        q, k, v, dropout_rate=RATE, dropout_key=KEY, implementation=implementation, interpret=interpret, **arguments
    )


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_shards_and_chunks_drop_what_the_whole_drops(implementation):
    q, k, v = (normal(seed, (4, 40, heads, 16)) for seed, heads in ((0, 4), (1, 2), (2, 2)))
    whole = attend(q, k, v, implementation)
    shard = attend(q[2:, :, 2:], k[2:, :, 1:], v[2:, :, 1:], implementation, dropout_offset=(2, 2))
    assert_close(shard, whole[2:, :, 2:], jnp.float32, "a shard of rows and heads")
    chunk = attend(q[:, 24:], k, v, implementation, q_offset=jnp.full(4, 24))
    assert_close(chunk, whole[:, 24:], jnp.float32, "a chunk of queries")


def test_the_mean_over_keys_is_the_result_without_dropout():
    q, k, v = (normal(seed, (1, 12, 2, 16)) for seed in range(3))
    run = jax.jit(jax.vmap(lambda key: kernels.flash_attention(q, k, v, dropout_rate=0.5, dropout_key=key)))
    many = run(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(many.mean(0), kernels.flash_attention(q, k, v), atol=0.15)
