"""The decode loop: compiled once for a bucket, rows that do not depend on their neighbours, sampling, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import small
from vishwamai_eqx import decode
from vishwamai_eqx.architecture import build
from vishwamai_eqx.attention import KVCache
from vishwamai_eqx.decode import Sampling

EOS = 3


@functools.cache
def model():
    return jax.jit(lambda: build(small(), "float32", jax.random.key(0)))()


AS_IT_IS = Sampling()


def write(prompts, sampling=AS_IT_IS, tokens=8, seed=0):
    return decode.generate(model(), prompts, max_new_tokens=tokens, eos_id=EOS, sampling=sampling, seed=seed)


def test_another_prompt_of_the_same_bucket_compiles_nothing():
    write([[5, 6, 7]])
    compiled = decode.prefill._cache_size(), decode.decode._cache_size()
    write([[8, 9, 10, 11, 12]], Sampling(temperature=0.5, top_k=3, top_p=0.9), tokens=7, seed=4)
    assert (decode.prefill._cache_size(), decode.decode._cache_size()) == compiled


def test_a_row_does_not_depend_on_its_neighbours():
    alone = write([[5, 6, 7]])
    assert write([[5, 6, 7], [9, 10, 11, 12, 13]])[0] == alone[0]
    assert write([[5, 6, 7]], seed=1) != alone


def test_the_least_of_each_cut_is_greedy():
    greedy = write([[5, 6, 7]], Sampling(temperature=0.0))
    assert write([[5, 6, 7]], Sampling(top_k=1)) == greedy
    assert write([[5, 6, 7]], Sampling(top_p=1e-6)) == greedy
    assert write([[5, 6, 7]], Sampling(temperature=1e-5)) == greedy


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(5.0), Sampling(5.0, top_k=60, top_p=0.99)], ids=str)
def test_padding_of_the_vocabulary_is_never_drawn(sampling):
    prompts = [[5, 6, token] for token in range(8)]
    options = {"max_new_tokens": 16, "eos_id": -1, "sampling": sampling}
    free = decode.generate(model(), prompts, **options)
    bounded = decode.generate(model(), prompts, pieces=20, **options)
    assert max(map(max, free)) >= 20 > max(map(max, bounded))


def test_what_the_cuts_leave_is_drawn_as_often_as_it_is_likely():
    batch, shares = 4000, np.array([0.5, 0.3, 0.15, 0.05])
    nothing = jnp.zeros((1, batch, 1, 1, 1))
    cache = KVCache(nothing, nothing, jnp.zeros(batch, jnp.int32))
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(shares, jnp.float32)), (batch, 4))
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(1)))(jnp.arange(batch))
    draw = jax.jit(decode.draw)
    for top_k, top_p, left in ((0, 1.0, 4), (2, 1.0, 2), (0, 0.9, 3), (3, 0.6, 2)):
        settings = jnp.ones(batch), jnp.full(batch, top_k), jnp.full(batch, top_p)
        drawn = draw(decode.Rows(cache, logits, keys, jnp.zeros(batch, bool), *settings, jnp.int32(4)))
        expected = shares * (np.arange(4) < left)
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / batch, expected / expected.sum(), atol=0.03)


def test_a_row_ends_at_eos():
    (free,) = write([[5, 6, 7]], Sampling(temperature=0.0))
    ended = decode.generate(model(), [[5, 6, 7]], max_new_tokens=8, eos_id=free[2], sampling=Sampling(temperature=0.0))
    assert ended == [free[: free.index(free[2])]]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Sampling(temperature=-1.0), "temperature=-1.0 must be at least 0"),
        (lambda: Sampling(top_k=-2), "top_k=-2 must be at least 0"),
        (lambda: Sampling(top_p=0.0), "top_p=0.0 must be above 0"),
        (lambda: write([[]]), "prompt: it has no token"),
        (lambda: write([[5]], tokens=0), "max_new_tokens=0 must be at least 1"),
        (
            lambda: decode.generate(model(), [[5] * 10], max_new_tokens=8, eos_id=EOS, max_length=16),
            "max_new_tokens=8: with the prompt's 10 tokens it is over the model's context of 16; take at most 6",
        ),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError) as refusal:
        call()
    assert sentence in str(refusal.value)
