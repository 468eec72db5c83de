"""Drafts change how fast a text is written, and nothing else: whoever makes them, whatever they are."""

import collections
import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import VOCAB, small
from vishwamai_eqx import draft, lookup
from vishwamai_eqx.architecture import build
from vishwamai_eqx.engine import Engine, Request
from vishwamai_eqx.prune import TeacherPieces
from vishwamai_eqx.sampling import Sampling

PROMPT = [5, 6, 7, 5, 6, 9, 30, 31]
SAMPLINGS = [Sampling(0.0), Sampling(1.0, seed=1), Sampling(0.8, top_k=9, repetition_penalty=1.2, seed=2)]


@functools.cache
def model(seed=0, **settings):
    return jax.jit(lambda: build(small(**settings), "float32", jax.random.key(seed)))()


def write(several, tokens=12):
    return [result.tokens for result in several.run([Request(PROMPT, each, tokens) for each in SAMPLINGS])]


@functools.cache
def plain():
    return write(Engine(model(), eos_id=-1, slots=3))


def refined():
    """A vocabulary of 40 of the tokens; each other token is up to ten of its pieces."""
    rng = np.random.default_rng(0)
    kept = np.sort(rng.choice(VOCAB, 40, replace=False)).astype(np.int32)
    place = {int(token): [at] for at, token in enumerate(kept)}
    pieces = [place.get(token) or rng.integers(0, 40, rng.integers(2, 11)).tolist() for token in range(VOCAB)]
    return TeacherPieces(kept, np.concatenate(pieces).astype(np.int32), np.cumsum([*map(len, pieces)], dtype=np.int32))


@pytest.mark.parametrize("kind", ["same", "pruned"])
def test_a_draft_model_changes_no_text(kind):
    if kind == "same":
        guide = draft.same(model(1, num_layers=1), VOCAB)
    else:
        guide = draft.pruned(model(1, num_layers=1, vocab_size=40), VOCAB, refined())
    several = Engine(model(), eos_id=-1, slots=2, drafts=3, guide=guide, chunk=16)
    assert write(several) == plain()
    # What slots remember serves a guide too.
    assert write(several) == plain() and 0 < several.acceptance < 0.9


def test_a_model_that_drafts_for_itself_is_always_right():
    several = Engine(model(), eos_id=-1, slots=3, drafts=3, guide=draft.same(model(), VOCAB))
    assert write(several) == plain() and several.acceptance == 1
    # A step writes four tokens, of which there are twelve.
    assert several.steps == 3 * len(SAMPLINGS)


@functools.cache
def little():
    return model(vocab_size=8)


def probabilities(tokens):
    logits = eqx.filter_jit(lambda model, row: model.head(model(row)[0])[0, -1])(little(), jnp.asarray([tokens]))
    return np.asarray(jax.nn.softmax(logits))


def test_whatever_is_drafted_what_is_written_is_the_same(monkeypatch):
    """All drafts that there are, side by side; each row's draws have the same noise."""
    every = np.array(list(itertools.product(range(8), repeat=2)), np.int32)
    monkeypatch.setattr(lookup, "propose", lambda text, lengths, drafts: jnp.asarray(every))
    drafted = Engine(little(), eos_id=-1, slots=64, drafts=2)
    alone = Engine(little(), eos_id=-1, slots=1)
    accepted = 0
    for seed in range(6):
        request = Request([5, 6, 7], Sampling(1.0, seed=seed), 7)
        ((want,), several) = alone.run([request]), drafted.run([request] * 64)
        assert all(result.tokens == want.tokens for result in several)
        accepted = drafted.written - drafted.steps
    assert accepted > 0


def test_texts_come_as_often_as_the_model_says():
    several = Engine(little(), eos_id=-1, slots=64, drafts=1, guide=draft.same(model(1, vocab_size=8), 8))
    texts = 4000
    results = several.run([Request([5, 6, 7], Sampling(1.0, seed=seed), 2) for seed in range(texts)])
    found = collections.Counter(tuple(result.tokens) for result in results)
    expected = {
        (a, b): first * second
        for a, first in enumerate(probabilities([5, 6, 7]))
        for b, second in enumerate(probabilities([5, 6, 7, a]))
    }
    chi = sum((found[text] - texts * p) ** 2 / (texts * p) for text, p in expected.items())
    # Of 63 degrees of freedom, one in a thousand is above 104.
    assert chi < 104, chi
    assert 0 < several.acceptance < 1


def test_what_was_said_before_is_looked_up():
    text = jnp.asarray([[1, 2, 3, 4, 9, 2, 3, 0], [1, 1, 1, 0, 0, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]])
    found = lookup.propose(text, jnp.asarray([7, 3, 3]), 4)
    np.testing.assert_array_equal(found[:2], [[4, 9, 2, 3], [1, 1, 1, 1]])
