"""Chunked cross-entropy against the plain one."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vishwamai_eqx import loss


def plain(hidden, weight, targets, mask, softcap):
    logits = jnp.einsum("bsd,vd->bsv", hidden, weight)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * mask)


@pytest.mark.parametrize(
    ("chunk", "batch", "seq", "softcap"),
    [
        (1 << 22, 4, 6, None),
        (24, 3, 6, 2.0),
        (24, 4, 6, None),
        (12, 3, 6, None),
        (12, 4, 6, 2.0),
        (1, 3, 6, None),
        (1, 4, 6, 30.0),
        (4, 1, 29, None),
        (3, 13, 1, 2.0),
    ],
)
def test_value_and_gradients_are_the_plain_ones(monkeypatch, chunk, batch, seq, softcap):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 1)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk * 31)
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, weight = jax.random.normal(keys[0], (batch, seq, 8)), jax.random.normal(keys[1], (31, 8))
    targets = jax.random.randint(keys[2], (batch, seq), 0, 31)
    mask = (jax.random.uniform(keys[3], (batch, seq)) < 0.7).astype(jnp.float32)
    expected = jax.value_and_grad(lambda h, w: 3 * plain(h, w, targets, mask, softcap), (0, 1))(hidden, weight)
    ours = jax.value_and_grad(lambda h, w: 3 * loss.cross_entropy(h, w, targets, mask, softcap), (0, 1))
    found = ours(hidden, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, found)


@pytest.mark.parametrize("vocab", [31, 512])
def test_one_chunk_in_bf16(vocab):
    """XLA's CPU library has not every product in bf16, and is asked for none that it has not."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, weight = (jax.random.normal(key, shape) for key, shape in zip(keys, ((4, 6, 8), (vocab, 8)), strict=False))
    targets, mask = jax.random.randint(keys[2], (4, 6), 0, vocab), jnp.ones((4, 6))
    gradients = jax.jit(jax.grad(loss.cross_entropy, (0, 1)))
    expected = gradients(hidden, weight, targets, mask)
    found = gradients(hidden.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), targets, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b.astype(a.dtype), a, atol=0.05, rtol=0.05), expected, found)


def compiled_gradient(monkeypatch, batch, seq, vocab):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 16)
    shapes = jax.ShapeDtypeStruct((batch, seq, 8), jnp.float32), jax.ShapeDtypeStruct((vocab, 8), jnp.float32)
    ints, mask = jax.ShapeDtypeStruct((batch, seq), jnp.int32), jax.ShapeDtypeStruct((batch, seq), jnp.float32)
    return jax.jit(jax.grad(loss.cross_entropy, (0, 1))).lower(*shapes, ints, mask).compile()


@pytest.mark.parametrize(("batch", "seq"), [(8, 32), (1, 257), (257, 1)])
def test_no_array_of_all_logits_is_ever_made(monkeypatch, batch, seq):
    vocab = 1000
    compiled = compiled_gradient(monkeypatch, batch, seq, vocab)
    assert compiled.memory_analysis().temp_size_in_bytes < batch * seq * vocab * 4 / 2


@pytest.mark.parametrize(("batch", "seq", "tokens"), [(1, 47, 16), (17, 1, 9), (1, 32, 16)])
def test_a_few_tokens_too_many_for_one_chunk_are_cut_too(monkeypatch, batch, seq, tokens):
    """So few that weights and hidden states outweigh the logits: each array of the program is looked at."""
    vocab = 1000
    program = compiled_gradient(monkeypatch, batch, seq, vocab).as_text()
    arrays = [math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"f32\[([\d,]+)\]", program)]
    assert max(arrays) == tokens * vocab
