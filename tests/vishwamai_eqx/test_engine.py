"""The engine: whatever stands beside a row, what it shares and however its prompt is cut, a text is its own."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests.small import MIXED, VOCAB, rarely, small
from vishwamai_eqx import decode, engine, gemma, mesh
from vishwamai_eqx.architecture import build
from vishwamai_eqx.engine import Engine, Request
from vishwamai_eqx.gemma_config import GemmaConfig
from vishwamai_eqx.sampling import Sampling

EOS = 3
GREEDY = Sampling(temperature=0.0)
VARIED = [
    GREEDY,
    Sampling(seed=1),
    Sampling(0.7, top_k=9, seed=2),
    Sampling(1.3, top_p=0.9, min_p=0.02, seed=3),
    Sampling(1.0, repetition_penalty=1.3, seed=4),
    Sampling(0.0, presence_penalty=2.0, repetition_penalty=0.9),
]


@functools.cache
def model(kind="vishwamai"):
    if kind == "vishwamai":
        return jax.jit(lambda: build(small(), "float32", jax.random.key(0)))()
    kinds = ("sliding_attention", "full_attention", "sliding_attention")
    config = GemmaConfig(
        "gemma2", VOCAB, 32, 48, 3, 4, 2, 16, max_position_embeddings=256, layer_types=kinds, sliding_window=8
    )
    return jax.jit(lambda: gemma.Decoder(config, key=jax.random.key(0)))()


@functools.cache
def alone(kind, prompt, sampling, tokens):
    """What the model writes by whole passes over all there is, one row at a time; each draw by its own settings."""
    written, several = list(prompt), model(kind)
    settings = decode.sampling.settings_of([sampling], [len(prompt)])
    for _ in range(tokens):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(written)] = written
        token = _next(several, padded, np.array([len(written)], np.int32), settings)
        written.append(int(token[0]))
    return written[len(prompt) :]


@jax.jit
def _next(several, padded, lengths, settings):
    logits = several.head(several(padded)[0])[jnp.arange(1), lengths - 1]
    return decode.sampling.draw(settings, logits, padded, lengths, jnp.int32(VOCAB))[0]


def prompts_of(seed, count):
    """Prompts of which some begin alike, some are the same and some are others' beginnings."""
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(4, VOCAB, rng.integers(1, 40)).tolist())]
    for _ in range(count - 1):
        old = prompts[rng.integers(len(prompts))]
        kept = old[: rng.choice([0, len(old), rng.integers(1, len(old) + 1)])]
        prompts.append(kept + tuple(rng.integers(4, VOCAB, rng.integers(0 if kept else 1, 20)).tolist()))
    return prompts


@pytest.mark.parametrize("kind", ["vishwamai", "gemma"])
@hypothesis.settings(max_examples=6)
@hypothesis.given(
    seed=st.integers(0, 1),
    order=st.permutations(range(6)),
    shape=st.sampled_from([(1, 16, 0), (3, 32, 0), (3, 32, 3)]),
)
def test_a_row_is_written_as_if_it_were_alone(kind, seed, order, shape):
    slots, chunk, drafts = shape
    prompts = prompts_of(seed, 6)
    requests = [Request(prompts[i], VARIED[i], 6 + i) for i in order]
    made = Engine(model(kind), eos_id=-1, slots=slots, chunk=chunk, drafts=drafts).run(requests)
    for request, result in zip(requests, made, strict=True):
        assert result.tokens == alone(kind, request.prompt, request.sampling, request.max_new_tokens)
        assert (len(result.logprobs), result.ending) == (request.max_new_tokens, "length")


@pytest.mark.parametrize("kind", ["vishwamai", "gemma"])
def test_what_prompts_share_is_read_once(kind):
    prompt = prompts_of(5, 1)[0] * 2
    several = Engine(model(kind), eos_id=-1, slots=4)
    branches = [Request(prompt, Sampling(seed=i), 5) for i in range(6)]
    first = several.run(branches)
    # Each but the first reads the last token once more, whose logits it draws from.
    assert several.read <= len(prompt) + len(branches) - 1 if kind == "vishwamai" else several.read < 3 * len(prompt)
    read = several.read
    # A branch goes on where a row has ended, which its slot still holds.
    longer = [*prompt, *first[-1].tokens, 7]
    assert several.run([Request(longer, GREEDY, 5)])[0].tokens == alone(kind, tuple(longer), GREEDY, 5)
    assert several.read - read == 1


def test_a_hundred_prompts_compile_nothing_that_the_first_of_each_bucket_did_not():
    rng = np.random.default_rng(0)

    def write(lengths):
        requests = [
            Request(rng.integers(4, VOCAB, n).tolist(), VARIED[i % 6], 4 + i % 3) for i, n in enumerate(lengths)
        ]
        Engine(model(), eos_id=EOS, slots=4, chunk=32).run(requests)

    # Alone and together, of each bucket up to a chunk, in caches as long as any will be.
    for lengths in ([60], [60, 40], [60, 20], [60] + [9] * 4, [60] + [20] * 4):
        write(lengths)
    programs = decode.new_rows, decode.prefill, decode.write
    compiled = [program._cache_size() for program in programs]
    write([60, *rng.integers(1, 60, 100)])
    assert [program._cache_size() for program in programs] == compiled


@pytest.mark.parametrize("sizes", [rarely({"data": 2}), rarely({"model": 4}), MIXED], ids=str)
@pytest.mark.parametrize("kind", ["vishwamai", "gemma"])
def test_on_a_mesh_the_text_is_that_of_one_device(kind, sizes):
    if kind == "gemma":
        sizes = {axis: n for axis, n in sizes.items() if axis != "expert"}
    whole, devices = model(kind), mesh.make_mesh(sizes)
    specs = mesh.place(whole, dict(devices.shape))
    laid = jax.device_put(whole, jax.tree.map(lambda spec: NamedSharding(devices, spec), specs))
    prompts = prompts_of(1, 6)
    requests = [Request(prompt, VARIED[i], 6) for i, prompt in enumerate(prompts)]
    several = Engine(laid, eos_id=-1, slots=3, chunk=16, drafts=2)
    for request, result in zip(requests, several.run(requests), strict=True):
        assert result.tokens == alone(kind, request.prompt, request.sampling, 6)


def write(prompts, sampling=GREEDY, tokens=8, eos_id=EOS, **options):
    return engine.generate(model(), prompts, max_new_tokens=tokens, eos_id=eos_id, sampling=sampling, **options)


def test_the_least_of_each_cut_is_greedy():
    greedy = write([[5, 6, 7]])
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(min_p=1.0), Sampling(temperature=1e-5)):
        assert write([[5, 6, 7]], sampling) == greedy


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(5.0), Sampling(5.0, top_k=60, top_p=0.99)], ids=str)
def test_padding_of_the_vocabulary_is_never_drawn(sampling):
    prompts = [[5, 6, token] for token in range(8)]
    free, bounded = (write(prompts, sampling, 16, -1, pieces=pieces) for pieces in (None, 20))
    assert max(map(max, free)) >= 20 > max(map(max, bounded))


def test_a_row_ends_at_eos():
    (free,) = write([[5, 6, 7]], eos_id=-1)
    ended = engine.generate(model(), [[5, 6, 7]], max_new_tokens=8, eos_id=free[2], sampling=GREEDY)
    assert ended == [free[: free.index(free[2])]]


def test_labels_are_scored_as_whole_passes_score_them():
    prompt, labels = prompts_of(2, 1)[0], [[5], [6, 7], [5, 9, 11]]
    several = Engine(model(), eos_id=EOS, slots=2)
    for label, score in zip(labels, several.score(prompt, labels), strict=True):
        tokens = jnp.asarray([[*prompt, *label]])
        said = jax.nn.log_softmax(model().head(model()(tokens)[0]))[0, len(prompt) - 1 :]
        np.testing.assert_allclose(score, sum(said[i, token] for i, token in enumerate(label)), rtol=1e-5)


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids):
        return "".join(chr(33 + token) for token in ids)


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_stop_string_ends_a_row_and_is_not_shown(drafts):
    (free,) = write([[5, 6, 7]], Sampling(2.0), 16, -1)
    text, sampling = Letters().decode(free), Sampling(2.0, seed=(0, 0))
    several = Engine(model(), eos_id=-1, tokenizer=Letters(), slots=1, drafts=drafts)
    stopped, never = several.run(
        [Request([5, 6, 7], sampling, 16, stop=(text[3:6],)), Request([5, 6, 7], sampling, 16, stop=("never",))]
    )
    assert (stopped.text, stopped.ending, stopped.tokens) == (text[:3], "stop", free[:6])
    assert (never.text, never.tokens) == (text, free)


def test_a_row_that_is_cancelled_makes_room():
    several = Engine(model(), eos_id=-1, slots=1)
    endless, other = several.submit(Request([5], GREEDY, 100)), several.submit(Request([6], GREEDY, 4))
    events = several.events()
    assert next(events).request == endless
    several.cancel(endless)
    assert [(event.request, event.ending) for event in events] == [(other, "length")]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: write([[]]), "prompt: it has no token"),
        (lambda: write([[5]], tokens=0), "max_new_tokens=0 must be at least 1"),
        (
            lambda: write([[5] * 10], max_length=16),
            "max_new_tokens=8: with the prompt's 10 tokens it is over the model's context of 16; take at most 6",
        ),
        (lambda: Engine(model(), eos_id=EOS).submit(Request([5], stop=("a",))), "stop=['a'] needs a tokenizer"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError) as refusal:
        call()
    assert sentence in str(refusal.value)
