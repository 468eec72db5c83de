"""What the cuts leave is drawn as often as it is likely; what cannot be is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vishwamai_eqx import sampling
from vishwamai_eqx.sampling import Sampling


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, 4),
        ({"top_k": 2}, 2),
        ({"top_p": 0.9}, 3),
        ({"top_k": 3, "top_p": 0.6}, 2),
        ({"min_p": 0.4}, 2),
        ({"min_p": 0.2}, 3),
    ],
    ids=str,
)
def test_what_the_cuts_leave_is_drawn_as_often_as_it_is_likely(settings, left):
    batch, shares = 4000, np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(shares, jnp.float32)), (batch, 4))
    arrays = sampling.settings_of([Sampling(**settings, seed=i) for i in range(batch)], [0] * batch)
    nothing = jnp.zeros((batch, 1), jnp.int32), jnp.zeros(batch, jnp.int32)
    drawn, said = jax.jit(sampling.draw)(arrays, logits, *nothing, jnp.int32(4))
    expected = shares * (np.arange(4) < left)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / batch, expected / expected.sum(), atol=0.03)
    np.testing.assert_allclose(np.exp(said[0]), shares, rtol=1e-5)


def test_penalties_are_those_of_what_the_row_has():
    logits = jnp.asarray([[2.0, 1.9, -1.0, -1.1]])
    text, lengths = jnp.asarray([[0, 1, 2, 3]]), jnp.asarray([2])

    draw = jax.jit(sampling.draw)

    def greedy(settings, prompt, text=text):
        arrays = sampling.settings_of([Sampling(0.0, **settings)], [prompt])
        return int(draw(arrays, logits, text, lengths, jnp.int32(4))[0][0])

    assert greedy({}, 0) == 0
    assert greedy({"presence_penalty": 1.0}, 1) == 0, "the prompt has token 0, and does not count"
    assert greedy({"presence_penalty": 1.0}, 0, jnp.asarray([[0, 0, 2, 3]])) == 1
    assert greedy({"repetition_penalty": 1.1}, 2, jnp.asarray([[0, 0, 2, 3]])) == 1
    # Negative logits are multiplied; of what is past the row's length nothing counts.
    assert greedy({"repetition_penalty": 100.0, "presence_penalty": 3.0}, 0) == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"top_k": -2}, "top_k=-2 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"min_p": 1.5}, "min_p=1.5 must be at least 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty=inf must be finite"),
    ],
)
def test_refusals(settings, sentence):
    with pytest.raises(ValueError) as refusal:
        Sampling(**settings)
    assert sentence in str(refusal.value)
