"""Weights in 8 bits: half the bytes, the same products within the format's bounds, and text all the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels import Quantized
from tests.kernels import formats64 as exact
from tests.small import random_batch, small
from vishwamai_eqx import engine, narrow, parameters
from vishwamai_eqx.architecture import build
from vishwamai_eqx.gemma import Decoder
from vishwamai_eqx.gemma_config import GemmaConfig
from vishwamai_eqx.layers import Embedding, TPUGEMMLinear
from vishwamai_eqx.mesh import gather, make_mesh
from vishwamai_eqx.sampling import Sampling

FORMATS = {"int8": "int8", "fp8": "e4m3"}


def model(**settings):
    config = dataclasses.replace(small(**{"hidden_size": 128, "ffn_dim": 128, **settings}), precision="bf16")
    return gather(build(config, "bfloat16", jax.random.key(0)), None, jnp.bfloat16)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize(("takes", "makes"), [(48, 160), (160, 48)])
def test_a_linear_map_is_that_of_the_weights_within_the_format(takes, makes, weights):
    linear = TPUGEMMLinear(takes, makes, False, key=jax.random.key(0))
    scale = np.exp2(np.arange(makes) % 7)[None]  # every column needs another one
    scaled = linear.weight * (scale.T if linear.transposed else scale)
    linear = jax.tree.map(lambda _: scaled, linear)
    x = jax.random.normal(jax.random.key(1), (2, 3, takes))
    y = narrow.quantize(linear, weights)(x).reshape(6, makes)
    flat, w = np.asarray(x, np.float64).reshape(6, takes), np.asarray(scaled, np.float64)
    w = w.T if linear.transposed else w
    w_error = exact.error(w, FORMATS[weights], (takes, 1))
    exact.assert_within(y, flat @ w, exact.product_error(flat, np.zeros_like(flat), w, w_error), weights)


@pytest.mark.parametrize("weights", FORMATS)
def test_an_embedding_and_a_head(weights):
    embedding = Embedding(96, 32, std=1.0, key=jax.random.key(0))
    held = narrow.quantize(embedding, weights)
    rows, table = held(jnp.arange(96)[None]), np.asarray(embedding.weight, np.float64)
    bound = exact.error(table, FORMATS[weights], (1, 32))
    exact.assert_within(rows[0], table, bound, "rows")
    hidden = jax.random.normal(jax.random.key(1), (1, 2, 32))
    h = np.asarray(hidden[0], np.float64)
    exact.assert_within(
        held.logits(hidden)[0], h @ table.T, exact.product_error(h, np.zeros_like(h), table.T, bound.T), "logits"
    )


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("experts", [8, 1])
def test_half_the_bytes_and_nearly_the_same_logits(weights, experts):
    wide = model(num_experts=experts, experts_per_token=min(experts, 2))
    held = narrow.quantize(wide, weights)
    kept = [leaf for leaf in jax.tree.leaves(held, is_leaf=parameters.is_parameter) if isinstance(leaf, Quantized)]
    assert len(kept) == 1 + 4 + 3
    assert all(leaf.values.dtype == narrow.DTYPES[weights] for leaf in kept)
    # A scale is four bytes for each of at least 128 numbers; the router and the norms are as they were.
    assert narrow.size(held) < narrow.size(wide) * (0.5 + 4 / 128 / 2 + 0.02)
    batch = random_batch(4, 16, 0)

    @jax.jit
    def logits(model):
        hidden, _, _ = model(jnp.asarray(batch.tokens), segment_ids=jnp.asarray(batch.segment_ids))
        return jax.nn.log_softmax(model.head(hidden))

    # On average: a token that goes to another expert, whose score was as good, may end anywhere.
    assert 0 < float(jnp.abs(logits(wide) - logits(held)).mean()) < 0.05
    # As far as weights that were rounded and are held in bf16 again would be.
    back = jax.tree.map(
        lambda leaf: (
            (leaf.values.astype(jnp.float32) * leaf.scales).astype(jnp.bfloat16)
            if isinstance(leaf, Quantized)
            else leaf
        ),
        held,
        is_leaf=parameters.is_parameter,
    )
    assert float(jnp.abs(logits(back) - logits(held)).mean()) < 0.005


def test_it_writes():
    """Greedily, and with the cache, what it says of the whole row at once."""
    held = narrow.quantize(model(), "int8")
    prompt = [5, 6, 7]
    (written,) = engine.generate(held, [prompt], max_new_tokens=6, eos_id=-1, sampling=Sampling(temperature=0.0))
    row = jnp.asarray([prompt + written])
    chosen = jax.jit(lambda model, row: model.head(model(row)[0]))(held, row)[0]
    for at, token in enumerate(written, len(prompt) - 1):
        assert chosen[at, token] >= chosen[at].max() - 0.05
    assert len(written) == 6


def test_a_gemma():
    config = GemmaConfig("gemma", 64, 32, 48, 2, 2, 1, 16)
    decoder = Decoder(config, "bfloat16", key=jax.random.key(0))
    held = narrow.quantize(decoder, "fp8")
    tokens = jnp.arange(1, 9)[None]
    far = [jax.nn.log_softmax(it.head(it(tokens)[0])) for it in (decoder, held)]
    assert 0 < float(jnp.abs(far[0] - far[1]).max()) < 0.5
    assert narrow.quantize(decoder, None) is decoder


def test_in_f16():
    linear = narrow.quantize(TPUGEMMLinear(48, 32, False, key=jax.random.key(0)), "int8")
    x = jax.random.normal(jax.random.key(1), (2, 48), jnp.float16)
    y = linear(x)
    assert y.dtype == jnp.float16
    np.testing.assert_array_equal(y, linear(x.astype(jnp.float32)).astype(jnp.float16))


def test_it_is_for_one_device():
    mesh = make_mesh({"data": 2})
    spread = jax.device_put(model(), NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(ValueError, match="weights=int8 is for one device, and the model lies on 2"):
        narrow.quantize(spread, "int8")
