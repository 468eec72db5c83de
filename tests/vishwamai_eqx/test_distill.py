"""The next-piece target against a teacher whose next pieces can be computed: a Markov chain over its tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vishwamai_eqx.distill import VocabularyMap, next_piece, vocabulary_map
from vishwamai_eqx.prune import TeacherPieces

BOS, PIECES = 0, 8
# Each of the teacher's tokens in pieces: eight that both have, and longer ones, some of which begin with others.
SEGMENTS = [[piece] for piece in range(PIECES)]
SEGMENTS += [[1, 2], [1, 2, 3], [2, 3], [3, 1], [4, 5], [4, 5, 6], [5, 5], [6, 7], [7, 1], [1, 7, 7], [6, 7, 4, 2]]
TOKENS = len(SEGMENTS)


def pieces_of(segments: list[list[int]]) -> TeacherPieces:
    ends = np.cumsum([len(each) for each in segments], dtype=np.int32)
    return TeacherPieces(np.arange(PIECES, dtype=np.int32), np.concatenate(segments).astype(np.int32), ends)


@pytest.fixture(scope="module")
def vocabulary() -> VocabularyMap:
    return vocabulary_map(pieces_of(SEGMENTS), TOKENS + 3)


def chain(seed: int) -> np.ndarray:
    """Probabilities of the next token after each one; `<bos>` comes once."""
    table = np.random.default_rng(seed).gamma(0.3, size=(TOKENS, TOKENS)) + 1e-3
    table[:, BOS] = 0
    return table / table.sum(axis=1, keepdims=True)


def logits(rows: np.ndarray) -> jnp.ndarray:
    """Of rows of probabilities, with three more that are of no token, and a constant that changes nothing."""
    with np.errstate(divide="ignore"):
        padded = np.pad(np.log(rows), ((0, 0), (0, 3)), constant_values=-np.inf)
    return jnp.asarray(padded.T - 3.0, jnp.float32)


def target(vocabulary: VocabularyMap, before: np.ndarray, after: np.ndarray, token: np.ndarray) -> np.ndarray:
    return np.exp(np.asarray(next_piece(vocabulary, logits(before), logits(after), jnp.asarray(token)))).T


def renormalised(after: np.ndarray) -> np.ndarray:
    return after[:, :PIECES] / after[:, :PIECES].sum(axis=1, keepdims=True)


def first_pieces(after: np.ndarray) -> np.ndarray:
    found = np.zeros((len(after), PIECES))
    np.add.at(found.T, [segment[0] for segment in SEGMENTS], after.T)
    return found


def variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.abs(p - q).sum(axis=-1) / 2


def test_after_the_first_token_the_target_is_the_truth_and_sampling_agrees(vocabulary):
    """After `<bos>` and one token there is one way to have read the pieces for each longer token, and no other."""
    table, rng = chain(0), np.random.default_rng(1)
    samples = 200_000
    first = rng.choice(TOKENS, samples, p=table[BOS])
    second = np.concatenate([rng.choice(TOKENS, (first == token).sum(), p=table[token]) for token in range(TOKENS)])
    first.sort()
    counts = np.zeros((PIECES, PIECES))
    starts = np.array([[segment[0], segment[1] if len(segment) > 1 else -1] for segment in SEGMENTS])
    following = np.where(starts[first, 1] < 0, starts[second, 0], starts[first, 1])
    np.add.at(counts, (starts[first, 0], following), 1)
    token = np.arange(1, PIECES)
    before, after = np.repeat(table[BOS][None], PIECES - 1, axis=0), table[token]
    found, seen = target(vocabulary, before, after, token), counts[token].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)

    # Exactly: whole tokens and the beginnings of longer ones.
    exact = table[BOS][token, None] * first_pieces(after)
    for longer, segment in enumerate(SEGMENTS):
        if len(segment) > 1:
            exact[segment[0] - 1, segment[1]] += table[BOS][longer]
    np.testing.assert_allclose(found, exact / exact.sum(axis=1, keepdims=True), atol=1e-6)

    empirical, weight = counts[token] / seen, seen[:, 0] / seen.sum()
    ours, others = weight @ variation(found, empirical), weight @ variation(renormalised(after), empirical)
    # What the distance of as many draws from their own distribution is on average.
    noise = weight @ (np.sqrt(2 / np.pi * found * (1 - found) / seen).sum(axis=1) / 2)
    print(f"total variation: {ours:.4f}, sampling noise {noise:.4f}, renormalised {others:.4f}")
    assert ours < 1.5 * noise < 0.01 and others > 0.2


def filtered(table: np.ndarray, pieces: list[int]) -> np.ndarray:
    """The next piece after those, by all the ways in which the teacher can have read them: the truth."""
    # How probable it is to have read them with so many pieces of a token behind it.
    states = {(BOS, 1): 1.0}

    def step(states: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
        moved: dict[tuple[int, int], float] = {}
        for (token, read), mass in states.items():
            if read < len(SEGMENTS[token]):
                moved[token, read + 1] = moved.get((token, read + 1), 0) + mass
            else:
                for following in range(1, TOKENS):
                    moved[following, 1] = moved.get((following, 1), 0) + mass * table[token, following]
        return moved

    for piece in pieces:
        states = {state: mass for state, mass in step(states).items() if SEGMENTS[state[0]][state[1] - 1] == piece}
    truth = np.zeros(PIECES)
    for (token, read), mass in step(states).items():
        truth[SEGMENTS[token][read - 1]] += mass
    return truth / truth.sum()


def test_far_from_the_truth_only_where_other_readings_are_likely(vocabulary):
    """In the middle of texts, against all readings of all pieces: most of what the others lack is there."""
    table, rng = chain(2), np.random.default_rng(3)
    ours, kept, firsts = [], [], []
    for _ in range(40):
        tokens = [BOS]
        for _ in range(12):
            tokens.append(int(rng.choice(TOKENS, p=table[tokens[-1]])))
        before, after, token = table[tokens[:-1]], table[tokens[1:]], np.array(tokens[1:])
        found = target(vocabulary, before, after, token)
        for at in range(len(token)):
            pieces = [piece for each in tokens[1 : at + 2] for piece in SEGMENTS[each]]
            truth = filtered(table, pieces)
            ours.append(variation(found[at], truth))
            kept.append(variation(renormalised(after[at : at + 1])[0], truth))
            firsts.append(variation(first_pieces(after[at : at + 1])[0], truth))
    mean = [float(np.mean(each)) for each in (ours, firsts, kept)]
    print(
        f"total variation, of {len(ours)} places: {mean[0]:.4f}, first pieces {mean[1]:.4f}, renormalised {mean[2]:.4f}"
    )
    assert mean[0] < 0.5 * mean[1] < 0.5 * mean[2]


def test_the_beginning_and_what_no_token_begins_with(vocabulary):
    table = chain(4)
    noise = np.full((1, TOKENS), 1 / TOKENS)
    found = [target(vocabulary, before, table[[BOS]], np.array([BOS])) for before in (noise, table[[3]])]
    for each in found:
        np.testing.assert_allclose(each, first_pieces(table[[BOS]]), atol=1e-6)


def test_a_token_that_surprised_and_a_vocabulary_without_longer_tokens(vocabulary):
    """Probabilities of 1e-30 are compared with each other, not rounded to nothing."""
    before = np.full((1, TOKENS), 1e-30)
    before[0, 3] = 1
    after = chain(5)[[1]]
    found = target(vocabulary, before, after, np.array([1]))
    even = np.full((1, TOKENS), 1 / TOKENS)
    np.testing.assert_allclose(found, target(vocabulary, even, after, np.array([1])), rtol=1e-5)
    plain = vocabulary_map(pieces_of(SEGMENTS[:PIECES]), PIECES)
    after = np.random.default_rng(0).dirichlet(np.ones(PIECES), 1)
    log_after = jnp.log(jnp.asarray(after.T, jnp.float32))
    found = np.exp(next_piece(plain, log_after, log_after, jnp.array([2])))
    np.testing.assert_allclose(found.T, after, rtol=1e-5)
    assert jax.jit(next_piece)(plain, log_after, log_after, jnp.array([2])).shape == (PIECES, 1)
