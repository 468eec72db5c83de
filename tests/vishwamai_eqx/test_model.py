"""The model as a whole: what a logit may depend on, and that the cache changes nothing."""

import functools
import inspect
import math

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import VOCAB, random_batch, small
from vishwamai_eqx import engine, flops, parameters
from vishwamai_eqx.architecture import build
from vishwamai_eqx.attention import TPUMultiHeadAttention, block_pattern
from vishwamai_eqx.config import PRESETS, ModelConfig
from vishwamai_eqx.layers import TPUGEMMLinear, TPULayerNorm
from vishwamai_eqx.model import VishwamAI
from vishwamai_eqx.sampling import Sampling
from vishwamai_eqx.tokenizer import VishwamAITokenizer

PATTERNS = {"full": {}, "window": {"window": 5}, "blocks": {"attention_block": 4}}
few = functools.partial(hypothesis.settings, max_examples=5)


@functools.cache
def model_of(pattern: str, **options) -> VishwamAI:
    config = small(attention_pattern=pattern, **PATTERNS[pattern], **options)
    return build(config, "float32", jax.random.key(1))


@jax.jit
def logits_of(model, tokens, segment_ids, positions):
    hidden, _, _ = model(tokens, segment_ids=segment_ids, positions=positions)
    return model.head(hidden)


def batch(rows=4, seed=0):
    return jax.tree.map(jnp.asarray, random_batch(rows, 16, seed))


@pytest.mark.parametrize("pattern", PATTERNS)
@few()
@hypothesis.given(st.integers(0, 15), st.integers(0, 1000))
def test_a_later_token_never_changes_an_earlier_logit(pattern, changed, seed):
    model = model_of(pattern)
    tokens = batch(seed=seed).tokens
    segments, positions = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(16), tokens.shape)
    before = logits_of(model, tokens, segments, positions)
    after = logits_of(model, tokens.at[:, changed].add(1), segments, positions)
    np.testing.assert_allclose(before[:, :changed], after[:, :changed], rtol=1e-5, atol=1e-5)
    assert np.abs(before[:, changed:] - after[:, changed:]).max() > 1e-3


@pytest.mark.parametrize(("pattern", "reaches"), [("full", 0), ("window", 10), ("blocks", 8)])
def test_a_pattern_bounds_what_a_query_sees(pattern, reaches):
    # One layer: with more, information hops from window to window.
    model = model_of(pattern, num_layers=1)
    tokens = batch().tokens
    segments, positions = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(16), tokens.shape)
    before = logits_of(model, tokens, segments, positions)[:, 14]
    # Blocks of 4: position 14 sees its own, 8 to 11, and the first, which is left alone here.
    for changed in range(4 if pattern == "blocks" else 0, 14):
        after = logits_of(model, tokens.at[:, changed].add(1), segments, positions)[:, 14]
        assert (np.abs(after - before).max() > 1e-4) == (changed >= reaches), changed


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("changed", [1, 2])
@few()
@hypothesis.given(st.integers(0, 1000))
def test_one_document_never_changes_another_in_its_row(pattern, changed, seed):
    """Neither a later one, which it could be seen by, nor an earlier one."""
    model, rows = model_of(pattern), batch(seed=seed)
    inside = rows.segment_ids == changed
    arguments = rows.segment_ids, rows.positions
    before = logits_of(model, rows.tokens, *arguments)
    after = logits_of(model, jnp.where(inside, (rows.tokens + 7) % VOCAB, rows.tokens), *arguments)
    others = ((rows.segment_ids > 0) & ~inside)[..., None]
    np.testing.assert_allclose(before * others, after * others, rtol=1e-5, atol=1e-5)
    assert np.abs(before - after).max() > 1e-3

    # No gradient of the others' logits reaches an embedding that only the changed one has.
    tokens = jnp.where(inside, VOCAB - 1, jnp.minimum(rows.tokens, VOCAB - 2))
    gradient = gradient_of(model, others, tokens, *arguments)
    assert np.abs(gradient[VOCAB - 1]).max() == 0
    assert np.abs(gradient).max() > 1e-3


@jax.jit
def gradient_of(model, chosen, tokens, segment_ids, positions):
    def loss(weight):
        changed = eqx.tree_at(lambda model: model.embedding.weight, model, weight)
        hidden, _, _ = changed(tokens, segment_ids=segment_ids, positions=positions)
        return jnp.sum(jnp.square(hidden) * chosen * jnp.arange(hidden.shape[-1]))

    return jax.grad(loss)(model.embedding.weight)


def test_padding_changes_no_logit():
    model, tokens = model_of("full"), batch().tokens
    positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
    whole = logits_of(model, tokens[:, :9], jnp.ones_like(tokens[:, :9]), positions[:, :9])
    segments = (positions < 9).astype(jnp.int32)
    padded = logits_of(model, tokens, segments, positions)
    np.testing.assert_allclose(whole, padded[:, :9], rtol=1e-5, atol=1e-5)


def test_padding_is_counted_nowhere():
    model, rows = model_of("full"), batch()
    padded = jax.tree.map(lambda field: jnp.pad(field, ((0, 0), (0, 8))), rows)
    of = jax.jit(lambda rows: model(rows.tokens, segment_ids=rows.segment_ids, positions=rows.positions)[2])
    metrics, more = of(rows), of(padded)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), metrics, more)
    assert metrics.load.sum() == (rows.segment_ids > 0).sum() * 2 * 2  # layers, choices


@few(max_examples=6)
@hypothesis.given(
    pattern=st.sampled_from(list(PATTERNS)),
    heads=st.sampled_from([(4, 4), (4, 1), (2, 2), (4, 2)]),
    experts=st.sampled_from([1, 3, 8]),
    tied=st.booleans(),
    lengths=st.lists(st.integers(1, 12), min_size=3, max_size=3),
)
def test_greedy_generation_with_the_cache_is_that_of_full_passes(pattern, heads, experts, tied, lengths):
    model = model_of(pattern, num_heads=heads[0], num_kv_heads=heads[1], num_experts=experts, tie_embeddings=tied)
    tokens = np.asarray(batch().tokens)
    prompts = [tokens[row, :length].tolist() for row, length in enumerate(lengths)]
    written = engine.generate(model, prompts, max_new_tokens=10, eos_id=VOCAB, sampling=Sampling(temperature=0.0))
    full = np.zeros((3, 32), np.int32)
    for row, (prompt, new) in enumerate(zip(prompts, written, strict=True)):
        assert len(new) == 10
        full[row, : len(prompt) + 10] = prompt + new
    positions = jnp.broadcast_to(jnp.arange(32), full.shape)
    logits = np.asarray(logits_of(model, jnp.asarray(full), jnp.ones_like(positions), positions))
    for row, (prompt, new) in enumerate(zip(prompts, written, strict=True)):
        predicted = logits[row, len(prompt) - 1 : len(prompt) + 9]
        # The same choice at every step, but for ties that rounding may break either way.
        best = predicted.max(axis=-1)
        np.testing.assert_allclose(predicted[np.arange(10), new], best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [32, 128, 768, 2048])
def test_the_loss_begins_at_that_of_a_guess_whatever_the_width(width, tied):
    """Of tokens that come again as words do, each as often the next one's as its own, and of tokens that hardly do."""
    vocab = 2048
    settings = {"num_heads": width // 16, "num_kv_heads": 1, "num_experts": 1, "ffn_dim": 64, "tie_embeddings": tied}
    config = small(vocab_size=vocab, hidden_size=width, **settings)
    model = jax.jit(lambda key: build(config, "float32", key))(jax.random.key(0))
    rng = np.random.default_rng(0)
    for tokens in (rng.integers(4, vocab, (4, 65)), rng.zipf(1.3, (4, 65)) % vocab):
        logits = model.head(model(jnp.asarray(tokens[:, :-1]))[0])
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()
        assert abs(nll / math.log(vocab) - 1) < 0.02


def test_dropout_is_on_with_a_key_only():
    model, rows = model_of("full", dropout_rate=0.3), batch()
    call = jax.jit(
        lambda key=None: model(rows.tokens, segment_ids=rows.segment_ids, positions=rows.positions, key=key)[0]
    )
    plain, dropped, other = call(), call(key=jax.random.key(0)), call(key=jax.random.key(1))
    assert np.abs(plain - dropped).max() > 1e-3
    assert np.abs(other - dropped).max() > 1e-3
    np.testing.assert_array_equal(dropped, call(key=jax.random.key(0)))


def test_remat_changes_no_gradient():
    rows = batch()

    def loss(model):
        hidden, _, _ = model(rows.tokens, segment_ids=rows.segment_ids, positions=rows.positions)
        return jnp.square(hidden).sum() * 1e-3 + model.head(hidden).sum() * 1e-3

    gradients = [
        jax.tree.leaves(jax.jit(jax.grad(loss))(model_of("full", remat=remat))) for remat in ("none", "dots", "full")
    ]
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_keys_that_a_query_sees_on_average(pattern):
    """Against a count of them, which is larger by what a query sees of itself: half a key at most is left out."""
    for length in (16, 64):
        config = small(attention_pattern=pattern, max_seq_len=length, window=5, attention_block=4)
        queries, keys = np.arange(length)[:, None], np.arange(length)
        seen = keys <= queries
        if pattern == "window":
            seen &= queries - keys < 5
        if pattern == "blocks":
            seen &= (queries // 4 - keys // 4 <= 1) | (keys < 4)
        assert 0 <= seen.sum() / length - flops.keys_seen(config) <= 0.5


def test_block_pattern():
    np.testing.assert_array_equal(block_pattern(4), [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]])


TOTALS = {
    "tiny": (3_610_880, 1_841_408),
    "base": (1_497_589_248, 478_373_376),
    "large": (53_420_236_800, 14_765_531_136),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_totals_of_the_presets(preset):
    config = PRESETS[preset]
    abstract = jax.eval_shape(lambda: build(config, "bfloat16", jax.random.key(0)))
    total, active = flops.parameters(config)
    assert parameters.count(abstract) == total
    assert (total, active) == TOTALS[preset]


@pytest.mark.parametrize("change", [{}, {"num_experts": 1}, {"tie_embeddings": False}])
def test_hand_count_of_parameters(change):
    config = small(**change)
    assert parameters.count(build(config, "float32", jax.random.key(0))) == flops.parameters(config)[0]


SIGNATURES = {
    VishwamAI: "vocab_size hidden_size=4096 num_layers=32 num_heads=32 num_experts=8 ffn_dim=16384 * num_kv_heads "
    "max_seq_len=2048 ... key",
    TPUGEMMLinear: "in_features features use_bias=True use_fp8=True block_size=128 * ... key",
    TPULayerNorm: "dim epsilon=1e-06 use_bias=True use_scale=True",
    TPUMultiHeadAttention: "hidden_size num_heads head_dim use_flash_attn=True use_fp8=True * num_kv_heads ... key",
    VishwamAITokenizer: "model_path max_length=512 pad_token=[PAD] unk_token=[UNK] bos_token=[BOS] eos_token=[EOS]",
}


@pytest.mark.parametrize("owner", SIGNATURES)
def test_signatures_of_the_contract(owner):
    expected, found = SIGNATURES[owner].split(), []
    for name, argument in list(inspect.signature(owner.__init__).parameters.items())[1:]:
        if argument.kind == argument.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        default = "" if argument.default is argument.empty else f"={argument.default}"
        found.append(f"{name}{default}")
    if "..." in expected:
        gap = expected.index("...")
        found[gap : len(found) - (len(expected) - gap - 1)] = ["..."]
    assert found == expected


def test_configuration_and_constructor_use_the_same_names():
    arguments = set(inspect.signature(VishwamAI.__init__).parameters) - {"self", "key", "compute_dtype", "fp8"}
    assert set(ModelConfig.__dataclass_fields__) == arguments


def test_initial_scale_of_the_residual_stream():
    model = build(small(hidden_size=128, num_layers=8), "float32", jax.random.key(0))
    std = {name: float(jnp.std(getattr(model.blocks.attention, name).weight)) for name in ("query", "out")}
    assert math.isclose(std["query"], 1 / math.sqrt(128), rel_tol=0.03)
    assert math.isclose(std["out"], 1 / math.sqrt(128) / math.sqrt(16), rel_tol=0.03)
