"""Layers, each against its formula; the router; what parameters declare."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import small
from vishwamai_eqx import layers, moe, parameters
from vishwamai_eqx.architecture import build
from vishwamai_eqx.attention import TPUMultiHeadAttention
from vishwamai_eqx.layers import GatedMLP, TPUGEMMLinear, TPULayerNorm, rotary_angles, rotate
from vishwamai_eqx.mesh import place

KEY = jax.random.key(0)


@pytest.mark.parametrize("features", [8, 24])
@pytest.mark.parametrize("use_bias", [True, False])
def test_linear(features, use_bias):
    layer = TPUGEMMLinear(12, features, use_bias, key=KEY)
    x = jax.random.normal(KEY, (3, 5, 12))
    weight = layer.weight if features > 12 else layer.weight.T
    np.testing.assert_allclose(layer(x), x @ weight, rtol=1e-5, atol=1e-5)
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert (layer.bias is not None) == use_bias


def test_layer_norm():
    x = 3 + 2 * jax.random.normal(KEY, (4, 32))
    y = np.asarray(TPULayerNorm(32)(x))
    np.testing.assert_allclose(y.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(axis=-1), 1, atol=1e-5)
    assert TPULayerNorm(32, use_bias=False, use_scale=False)(x).shape == x.shape


def test_rotary_scores_depend_on_distance_alone():
    q, k = jax.random.normal(KEY, (2, 1, 1, 1, 16))

    def at(x, position):
        return rotate(x, rotary_angles(jnp.full((1, 1), position), 16, 10_000.0, jnp.dtype(jnp.float32)))

    def score(m, n):
        return jnp.sum(at(q, m) * at(k, n))

    np.testing.assert_allclose(score(3, 1), score(103, 101), rtol=1e-4)
    assert abs(score(3, 1) - score(4, 1)) > 1e-3
    np.testing.assert_allclose(at(q, 0), q)


def test_heads_that_key_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"num_heads=4 is not divisible by num_kv_heads=3.*\[1, 2, 4\]"):
        TPUMultiHeadAttention(32, 4, 8, num_kv_heads=3, key=KEY)


def dense_moe(layer, x):
    """Every expert on every token, weighed by the router."""
    logits = x @ layer.router.weight
    best, index = jax.lax.top_k(logits, layer.router.experts_per_token)
    weights = jnp.sum(jax.nn.one_hot(index, logits.shape[-1]) * jax.nn.softmax(best)[..., None], axis=-2)
    inner = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, layer.gate)) * jnp.einsum("bsd,edf->bsef", x, layer.up)
    return jnp.einsum("bsef,edf,bse->bsd", inner, layer.down, weights)


def test_moe_is_the_weighted_sum_of_the_chosen_experts():
    layer = moe.MoE(16, 12, 4, 2, key=KEY)
    x = 30 * jax.random.normal(KEY, (3, 7, 16))
    found, metrics = layer(x, jnp.ones((3, 7)))
    np.testing.assert_allclose(found, dense_moe(layer, x), rtol=1e-4, atol=1e-3)
    assert metrics.load.sum() == 3 * 7 * 2


def test_router_losses_by_hand():
    layer = moe.MoE(16, 12, 4, 2, key=KEY).router
    x = 30 * jax.random.normal(KEY, (3, 7, 16))
    real = jnp.ones((3, 7)).at[0, 3:].set(0)
    _, _, metrics = layer(x, real)
    logits = np.asarray(x @ layer.weight, np.float64)
    balance, z = 0.0, 0.0
    for row, length in zip(logits, (3, 7, 7), strict=True):
        row = row[:length]
        probabilities = np.exp(row) / np.exp(row).sum(axis=-1, keepdims=True)
        share = np.bincount(np.argsort(-row, axis=-1)[:, :2].ravel(), minlength=4) / (2 * length)
        balance += 4 * np.sum(share * probabilities.mean(axis=0))
        z += np.mean(np.log(np.exp(row).sum(axis=-1)) ** 2)
    np.testing.assert_allclose(metrics.balance, balance, rtol=1e-5)
    np.testing.assert_allclose(metrics.z, z, rtol=1e-5)


def test_top_k_is_that_of_lax():
    logits = jnp.round(3 * jax.random.normal(KEY, (4, 50, 8))) + 0.0  # with ties; -0 is no tie to lax
    for k in (1, 2, 8):
        for mine, its in zip(moe.top_k(logits, k), jax.lax.top_k(logits, k), strict=True):
            np.testing.assert_array_equal(mine, its)


def test_gated_mlp():
    layer, x = GatedMLP(8, 12, key=KEY), jax.random.normal(KEY, (2, 3, 8))
    expected = (jax.nn.silu(x @ layer.gate.weight) * (x @ layer.up.weight)) @ layer.down.weight.T
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_declarations():
    model = build(small(tie_embeddings=False), "float32", KEY)
    declared = parameters.declarations(model)
    assert declared.embedding.weight.axes == ("vocab", "d_model")
    assert declared.blocks.experts.gate.axes == ("layers", "experts", "d_model", "d_ff")
    # Stacked norms have rank 2 and yet do not decay.
    undecayed = {"scale", "bias"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(declared):
        assert leaf.decay == (path[-1].name not in undecayed and "router" not in str(path)), path
    assert not declared.blocks.experts.router.weight.cast


def test_placement():
    model = build(small(hidden_size=64, num_heads=4, ffn_dim=256), "float32", KEY)
    spec = place(model, {"data": 2})
    # The whole tiles of 128 x 2 are preferred to the first dimension that 2 divides.
    assert spec.blocks.experts.gate == jax.sharding.PartitionSpec(None, None, None, "data")
    assert spec.blocks.attention.query.weight == jax.sharding.PartitionSpec(None, "data")
    assert spec.norm.scale == spec.blocks.experts_norm.scale == jax.sharding.PartitionSpec()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_gradient_of_a_row_is_the_sum_over_all_that_took_it(dtype):
    """In bf16 a running sum of ones ends at 256."""
    table, index = jnp.ones((3, 2), dtype), jnp.array([1] * 5000 + [2] * 3 + [-1, 3])
    gradient = jax.grad(lambda table: layers.take_rows(table, index).astype(jnp.float32).sum())(table)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient.astype(jnp.float32), [[0, 0], [jnp.asarray(5000, dtype)] * 2, [3, 3]])
