"""Chunked divergences against plain ones of the full logits."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vishwamai_eqx import divergence
from vishwamai_eqx.config import BATCH_AXES
from vishwamai_eqx.distill import VocabularyMap, next_piece, vocabulary_map
from vishwamai_eqx.divergence import Softness, Teacher, Terms, divergences
from vishwamai_eqx.mesh import make_mesh, sum_over
from vishwamai_eqx.prune import TeacherPieces

PIECES, TOKENS = 24, 37


def pieces_of(pieces: int, tokens: int, seed: int = 0) -> TeacherPieces:
    """Tokens that are made of two or three others, a piece or a longer token first."""
    rng = np.random.default_rng(seed)
    segments = [[piece] for piece in range(pieces)]
    while len(segments) < tokens:
        segment = segments[rng.integers(len(segments))] + [int(rng.integers(pieces))]
        segments += [segment] if segment not in segments[pieces:] else []
    ends = np.cumsum([len(each) for each in segments], dtype=np.int32)
    return TeacherPieces(np.arange(pieces, dtype=np.int32), np.concatenate(segments).astype(np.int32), ends)


def plain(hidden, weight, teacher: Teacher, mask, weights: Terms, softness: Softness):
    """Each term from all logits at once, in the words of its definition."""

    def logits(hidden, weight, softcap):
        found = jnp.einsum("bsd,vd->vbs", hidden, weight).reshape(len(weight), -1)
        return softcap * jnp.tanh(found / softcap) if softcap else found

    student = logits(hidden, weight, softness.softcap)
    theirs = logits(teacher.hidden, teacher.weight, softness.teacher_softcap)
    before = jnp.pad(theirs, ((0, 0), (1, 0)))[:, :-1]
    target = jax.lax.stop_gradient(next_piece(teacher.vocabulary, before, theirs, teacher.tokens.reshape(-1)))
    temperature, beta = softness.temperature, softness.beta
    q, s = (jax.nn.softmax(each / temperature, axis=0) for each in (target, student))
    m = beta * q + (1 - beta) * s

    def mean(of_pieces, scale=temperature**2):
        return scale * jnp.sum(of_pieces.sum(axis=0) * mask.reshape(-1))

    found = {
        "forward": mean(q * jnp.log(q / s)),
        "reverse": mean(s * jnp.log(s / q)),
        "jensen_shannon": mean(beta * q * jnp.log(q / m) + (1 - beta) * s * jnp.log(s / m)),
    }
    chosen = {name: value for name, value in found.items() if getattr(weights, name) is not None}
    one = jax.nn.softmax(target, axis=0)
    kl = mean(one * (jnp.log(one) - jax.nn.log_softmax(student, axis=0)), 1.0)
    agreement = jnp.sum((target.argmax(axis=0) == student.argmax(axis=0)) * mask.reshape(-1))
    total = sum(getattr(weights, name) * value for name, value in chosen.items())
    return total, (chosen, kl, agreement)


def example(batch: int, seq: int, seed: int = 0) -> tuple:
    keys = jax.random.split(jax.random.key(seed), 6)
    hidden, weight = jax.random.normal(keys[0], (batch, seq, 8)), jax.random.normal(keys[1], (PIECES, 8))
    # Two rows of logits more than there are tokens, as in padded vocabularies.
    vocabulary = vocabulary_map(pieces_of(PIECES, TOKENS), TOKENS + 3)
    # A row begins with what no token begins with.
    tokens = jax.random.randint(keys[2], (batch, seq), 0, TOKENS).at[:, 0].set(TOKENS - 1)
    theirs = jax.random.normal(keys[3], (batch, seq, 6))
    teacher = Teacher(theirs, jax.random.normal(keys[4], (TOKENS + 3, 6)), tokens, vocabulary)
    mask = (jax.random.uniform(keys[5], (batch, seq)) < 0.7).astype(jnp.float32)
    return hidden, weight, teacher, mask


ALL = Terms(jnp.float32(0.5), jnp.float32(0.3), jnp.float32(2.0))


@pytest.mark.parametrize(
    ("batch", "seq", "chunk", "weights", "softness"),
    [
        (2, 12, 8, ALL, Softness()),
        (3, 7, 4, ALL, Softness(2.0, 0.1, 3.0, 2.0)),
        (1, 5, 128, Terms(forward=jnp.float32(1.0)), Softness(0.7)),
        (2, 6, 1, Terms(reverse=jnp.float32(1.5)), Softness(4.0, 0.9, None, 30.0)),
    ],
)
def test_values_and_gradients_are_the_plain_ones(monkeypatch, batch, seq, chunk, weights, softness):
    monkeypatch.setattr(divergence, "CHUNK_TOKENS", chunk)
    hidden, weight, teacher, mask = example(batch, seq)

    def ours(hidden, weight):
        total, terms, closeness = divergences(hidden, weight, teacher, mask, weights, softness)
        return 3 * total, (terms, closeness)

    def theirs(hidden, weight):
        total, rest = plain(hidden, weight, teacher, mask, weights, softness)
        return 3 * total, rest

    both = jax.jit(lambda h, w: [jax.value_and_grad(of, (0, 1), has_aux=True)(h, w) for of in (ours, theirs)])
    ((total, (terms, closeness)), gradients), ((expected, (chosen, kl, agreement)), wanted) = both(hidden, weight)
    for found, value in ((total, expected), (closeness.kl, kl), (closeness.agreement, agreement)):
        np.testing.assert_allclose(found, value, rtol=1e-6)
    for name in ("forward", "reverse", "jensen_shannon"):
        assert (getattr(terms, name) is None) == (name not in chosen)
        if name in chosen:
            np.testing.assert_allclose(getattr(terms, name), chosen[name], rtol=1e-6)
    for found, value in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-6 * float(jnp.abs(value).max()))
    np.testing.assert_allclose(jax.jit(ours)(hidden, weight)[0], expected, rtol=1e-6)
    # Where there is nothing to learn, only of the masked out tokens something arrives nowhere.
    assert float(jnp.abs(gradients[0][mask == 0]).max(initial=0)) == 0 < float(jnp.abs(gradients[1]).max())


def test_on_a_mesh_it_is_the_same():
    """Rows over `data`, both vocabularies over `model`."""
    mesh = make_mesh({"data": 2, "model": 2})

    def is_spec(leaf):
        return isinstance(leaf, P)

    hidden, weight, teacher, mask = example(4, 6)
    softness = Softness(2.0, 0.1, 3.0, 2.0)

    def run(hidden, weight, teacher, mask):
        def total(hidden, weight):
            found = sum_over(divergences(hidden, weight, teacher, mask, ALL, softness), *BATCH_AXES)
            return found[0], found[1:]

        return jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, weight)

    everywhere = jax.tree.map(lambda _: P(), teacher)
    teachers = eqx.tree_at(
        lambda it: (it.hidden, it.weight, it.tokens), everywhere, (P("data"), P("model"), P("data")), is_leaf=is_spec
    )
    specs = (P("data"), P("model"), teachers, P("data"))
    outs = ((P(), P()), (P("data"), P("model")))
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=True))
    expected = jax.jit(run)(hidden, weight, teacher, mask)
    found = sharded(hidden, weight, teacher, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_nothing_is_left_to_learn_of_oneself():
    """A student that is the teacher, cut nowhere: each term and its gradient are zero."""
    hidden, weight, teacher, mask = example(2, 5)
    alone = vocabulary_map(pieces_of(PIECES, PIECES), PIECES)
    teacher = Teacher(hidden, weight, teacher.tokens % PIECES, alone)
    softness = Softness(1.5, 0.3, 5.0, 5.0)

    def run(hidden, weight):
        total, _, closeness = divergences(hidden, weight, teacher, mask, ALL, softness)
        return total, closeness

    (total, closeness), gradients = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(hidden, weight)
    assert abs(float(total)) < 1e-5 and all(float(jnp.abs(each).max()) < 1e-5 for each in gradients)
    assert float(closeness.agreement) == float(mask.sum()) and abs(float(closeness.kl)) < 1e-5


def test_no_gradient_reaches_the_teacher():
    hidden, weight, teacher, mask = example(2, 5)

    def of_teacher(theirs, teacher_weight):
        changed = Teacher(theirs, teacher_weight, teacher.tokens, teacher.vocabulary)
        return divergences(hidden, weight, changed, mask, ALL, Softness())[0]

    for gradient in jax.jit(jax.grad(of_teacher, (0, 1)))(teacher.hidden, teacher.weight):
        assert not np.asarray(gradient).any()


def test_in_bf16_it_is_the_same_but_for_rounding():
    hidden, weight, teacher, mask = example(2, 24)
    narrow = [each.astype(jnp.bfloat16) for each in (hidden, weight, teacher.hidden, teacher.weight)]
    lower = Teacher(narrow[2], narrow[3], teacher.tokens, teacher.vocabulary)
    run = jax.jit(jax.value_and_grad(lambda h, w, t: divergences(h, w, t, mask, ALL, Softness())[0], (0, 1)))
    wanted, found = run(hidden, weight, teacher), run(narrow[0], narrow[1], lower)
    assert [each.dtype for each in found[1]] == [jnp.bfloat16] * 2
    np.testing.assert_allclose(found[0], wanted[0], rtol=0.02)
    for a, b in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b, atol=0.05 * float(jnp.abs(b).max()))


def test_temporaries_are_a_fraction_of_what_the_full_logits_take():
    """At the vocabularies of preset base and of Gemma, by the compiler's count."""
    pieces, rows, batch, seq, width = 131_072, 256_000, 1, 2048, 8

    def arguments():
        entries, real = jnp.zeros(140_000, jnp.int32), jnp.ones((batch, seq))
        vocabulary = VocabularyMap(jnp.zeros(rows, jnp.int32), entries, entries, entries, pieces)
        hidden, weight = jnp.zeros((batch, seq, width)), jnp.zeros((pieces, width))
        teacher = Teacher(hidden, jnp.zeros((rows, width)), real.astype(jnp.int32), vocabulary)
        return hidden, weight, teacher, real, ALL

    def temporaries(of):
        gradient = jax.jit(jax.grad(lambda h, w, t, m, k: of(h, w, t, m, k, Softness(2.0))[0], (0, 1)))
        compiled = gradient.lower(*jax.eval_shape(arguments)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours, full = temporaries(divergences), temporaries(plain)
    print(f"temporaries: {ours / 1e9:.2f} GB, of the full logits {full / 1e9:.2f} GB, {full / ours:.1f} times")
    assert 8 * ours < full
