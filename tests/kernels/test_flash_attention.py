"""Every implementation of flash attention against the reference, and that against JAX's own and a plain loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.flash_attention import pallas_blocks, pallas_scores, pallas_tpu, tiles, xla
from tests.kernels.comparison import assert_close, normal

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16


# The arguments that ask for each form: the two regimes of the XLA form, and the TPU kernels, interpreted.
FORMS = {
    "reference": {"implementation": "reference"},
    "short": {"implementation": "xla"},
    "tiles": {"implementation": "xla"},
    "pallas_tpu": {"implementation": "pallas_tpu", "interpret": True},
}


@pytest.fixture(params=["short", "tiles", "pallas_tpu"])
def form(request, monkeypatch):
    """Each form, with blocks small enough that short sequences have several."""
    shrink(monkeypatch, request.param)
    return request.param


def shrink(monkeypatch, regime):
    monkeypatch.setattr(xla, "QUERIES", 40)
    monkeypatch.setattr(xla, "SHORT", 0 if regime == "tiles" else 10**9)
    monkeypatch.setattr(tiles, "QUERIES", 32)
    monkeypatch.setattr(tiles, "KEYS", 24)
    # Interpreted registers may have any number of lanes; blocks of 75 queries and keys then come in several.
    monkeypatch.setattr(pallas_blocks, "LANES", 8)
    monkeypatch.setattr(pallas_scores, "LANES", 8)
    small = pallas_blocks.BlockSizes(
        q=32, kv=32, q_backward=24, kv_backward=24, chunk=16, chunk_backward=8, kv_resident=48
    )
    monkeypatch.setattr(pallas_tpu, "default_blocks", lambda *_: small)


def inputs(q_len=75, kv_len=75, dtype=jnp.float32, heads=HEADS, kv_heads=KV_HEADS, batch=BATCH):
    q = normal(0, (batch, q_len, heads, HEAD_DIM), dtype)
    k, v = (normal(seed, (batch, kv_len, kv_heads, HEAD_DIM), dtype) for seed in (1, 2))
    return q, k, v


def random_mask(share, *shape):
    return np.random.default_rng(3).random(shape) < share


SEGMENTS = jnp.asarray(np.repeat([[0, 1, 2, 2, 5]] * BATCH, 15, axis=1))
DROPOUT = {"dropout_rate": 0.3, "dropout_key": jax.random.key(7), "dropout_offset": (5, 2)}

# name: (lengths, arguments)
CASES = {
    "causal": ({}, {}),
    "segments": ({}, {"segment_ids": SEGMENTS}),
    "segment pair": ({"q_len": 30}, {"segment_ids": (SEGMENTS[:, 20:50], SEGMENTS), "causal": False}),
    "window, softcap, scale": ({}, {"window": 17, "softcap": 1.5, "scale": 0.4}),
    "window only": ({}, {"window": 9, "causal": False}),
    "mask per head": ({}, {"mask": jnp.asarray(random_mask(0.05, BATCH, HEADS, 75, 75))}),
    "mask of keys": ({}, {"mask": jnp.asarray(random_mask(0.5, BATCH, 1, 1, 75)), "causal": False}),
    "block mask": ({}, {"mask": random_mask(0.4, 5, 5), "block_size": 16}),
    "traced block mask": ({}, {"mask": jnp.asarray(random_mask(0.4, 5, 5)), "block_size": 16}),
    "cache": (
        {"q_len": 10, "kv_len": 90},
        {"q_offset": jnp.asarray([0, 70]), "kv_lengths": jnp.asarray([0, 78]), "window": 40},
    ),
    "dropout": ({}, DROPOUT | {"segment_ids": SEGMENTS, "softcap": 3.0}),
    "more queries than keys": ({"q_len": 90, "kv_len": 20}, {"window": 30}),
}


def value_and_gradients(form, operands, arguments):
    """Result, log-sum-exp and gradients of a loss that uses both."""
    direction = normal(9, operands[0].shape)

    def loss(q, k, v):
        out, lse = kernels.flash_attention(q, k, v, return_lse=True, **FORMS[form], **arguments)
        total = jnp.sum(out.astype(jnp.float32) * direction) + jnp.sum(jnp.where(jnp.isinf(lse), 0, jnp.sin(lse)))
        return total, (out, lse)

    gradients, (out, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*operands)
    return {"out": out, "lse": lse, "gradients": gradients}


@functools.cache
def expected(name, dtype):
    lengths, arguments = CASES[name]
    rounded = [x.astype(jnp.float32) for x in inputs(dtype=dtype, **lengths)]
    return value_and_gradients("reference", rounded, arguments)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_match_the_reference(name, form):
    lengths, arguments = CASES[name]
    actual = value_and_gradients(form, inputs(**lengths), arguments)
    assert_close(actual, expected(name, jnp.float32), jnp.float32, name)


@pytest.mark.parametrize("name", ["segments", "dropout"])
def test_bf16_matches_the_reference_of_the_rounded_inputs(name, form):
    lengths, arguments = CASES[name]
    actual = value_and_gradients(form, inputs(dtype=jnp.bfloat16, **lengths), arguments)
    assert actual["out"].dtype == jnp.bfloat16 and actual["lse"].dtype == jnp.float32
    assert_close(actual, expected(name, jnp.bfloat16), jnp.bfloat16, name)


@pytest.mark.parametrize("regime", ["short", "tiles"])
def test_f64_is_computed_in_f64(regime, monkeypatch):
    shrink(monkeypatch, regime)
    with jax.enable_x64(True):
        operands = inputs(dtype=jnp.float64)
        both = [value_and_gradients(name, operands, {"segment_ids": SEGMENTS}) for name in (regime, "reference")]
        assert both[0]["out"].dtype == jnp.float64
        assert_close(*both, jnp.float64, "f64")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"is_causal": True}),
        ({"causal": False, "scale": 0.3}, {"scale": 0.3}),
        ({"window": 11}, {"is_causal": True, "local_window_size": (10, 0)}),
        (
            {"mask": jnp.asarray(random_mask(0.5, BATCH, HEADS, 75, 75) | np.eye(75, dtype=bool))},
            {"mask": jnp.asarray(random_mask(0.5, BATCH, HEADS, 75, 75) | np.eye(75, dtype=bool)), "is_causal": True},
        ),
        (
            {"causal": False, "kv_lengths": jnp.asarray([40, 75])},
            {"key_value_seq_lengths": jnp.asarray([40, 75], jnp.int32)},
        ),
    ],
)
def test_reference_matches_jax(ours, theirs):
    operands = inputs()
    direction = normal(9, operands[0].shape)
    gradients = [
        jax.jit(jax.grad(lambda q, k, v, attend=attend: jnp.sum(attend(q, k, v) * direction), argnums=(0, 1, 2)))
        for attend in (
            lambda q, k, v: kernels.flash_attention(q, k, v, implementation="reference", **ours),
            lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **theirs),
        )
    ]
    assert_close(gradients[0](*operands), gradients[1](*operands), jnp.float32, "gradients")
    out = kernels.flash_attention(*operands, implementation="reference", **ours)
    assert_close(out, jax.nn.dot_product_attention(*operands, **theirs), jnp.float32, "out")


def loop(q, k, v, causal, window, softcap, offset, lengths, q_segments, kv_segments):
    """Attention one row at a time, in f64 NumPy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        kv_head = h // (q.shape[2] // k.shape[2])
        position = i + offset[b]
        seen = [
            j
            for j in range(k.shape[1])
            if (not causal or j <= position)
            and (window is None or position - j < window)
            and j < lengths[b]
            and q_segments[b, i] == kv_segments[b, j]
        ]
        if seen:
            scores = k[b, seen, kv_head] @ q[b, i, h] / np.sqrt(q.shape[3])
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[b, i, h] = weights / weights.sum() @ v[b, seen, kv_head]
    return out


@settings(max_examples=5)
@given(data=st.data())
@pytest.mark.parametrize("regime", FORMS)
def test_any_shape_and_mask_matches_a_loop(regime, data):
    def draw(strategy, label):
        return data.draw(strategy, label=label)

    def row(low, high, label):
        return draw(st.lists(st.integers(low, high), min_size=BATCH, max_size=BATCH), label)

    q_len, kv_len = draw(st.integers(1, 60), "q_len"), draw(st.integers(1, 60), "kv_len")
    kv_heads = draw(st.sampled_from([1, 2]), "kv_heads")
    heads = kv_heads * draw(st.sampled_from([1, 3]), "group")
    causal, window = draw(st.booleans(), "causal"), draw(st.none() | st.integers(1, 30), "window")
    softcap = draw(st.sampled_from([None, 0.7]), "softcap")
    offset = None if draw(st.booleans(), "at 0") else row(0, 40, "q_offset")
    lengths = row(0, kv_len, "kv_lengths")
    generator = np.random.default_rng(draw(st.integers(0, 99), "seed"))
    q_segments, kv_segments = (np.sort(generator.integers(0, 3, (BATCH, n)), axis=1) for n in (q_len, kv_len))
    operands = inputs(q_len, kv_len, heads=heads, kv_heads=kv_heads)
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch, regime)
        out = jax.jit(
            functools.partial(
                kernels.flash_attention,
                causal=causal,
                window=window,
                softcap=softcap,
                **FORMS[regime],
            )
        )(
            *operands,
            q_offset=None if offset is None else jnp.asarray(offset),
            kv_lengths=jnp.asarray(lengths),
            segment_ids=(jnp.asarray(q_segments), jnp.asarray(kv_segments)),
        )
    want = loop(*operands, causal, window, softcap, offset or [0] * BATCH, lengths, q_segments, kv_segments)
    assert_close(out, want, jnp.float32, "out")


def test_rows_that_see_nothing_give_zeros_and_no_gradient(form):
    lengths, arguments = CASES["cache"]
    result = value_and_gradients(form, inputs(**lengths), arguments)
    assert np.all(np.asarray(result["out"][0]) == 0) and np.all(np.isneginf(result["lse"][0]))
    for gradient in result["gradients"]:
        assert np.all(np.asarray(gradient[0]) == 0) and np.all(np.isfinite(gradient)) and np.any(gradient[1] != 0)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("regime", ["tiles", "pallas_tpu"])
def test_empty_blocks_are_not_computed(monkeypatch, regime, traced):
    """Keys that no visible tile holds may be anything: 0 times NaN would show that they were read."""
    shrink(monkeypatch, regime)
    mask = np.ones((4, 4), bool)
    mask[:, 1:3] = False
    q, k, v = inputs(q_len=96, kv_len=96)
    poisoned = [x.at[:, 24:72].set(jnp.nan) for x in (k, v)]
    run = jax.jit(functools.partial(kernels.flash_attention, block_size=24, **FORMS[regime]))
    if traced:
        out, want = run(q, *poisoned, jnp.asarray(mask)), run(q, k, v, jnp.asarray(mask))
    else:
        out, want = (jax.jit(functools.partial(run, mask=mask))(q, *pair) for pair in (poisoned, (k, v)))
    assert_close(out, want, jnp.float32, "out")


@pytest.mark.parametrize("arguments", [{}, {"window": 20}, {"causal": False}, {"causal": False, "window": 1}])
def test_tiles_out_of_sight_are_skipped(monkeypatch, arguments):
    shrink(monkeypatch, "tiles")
    tables = []
    visible_tiles = tiles._visible_tiles
    monkeypatch.setattr(tiles, "_visible_tiles", lambda *a: tables.append(visible_tiles(*a)) or tables[-1])
    attend = functools.partial(kernels.flash_attention, implementation="xla", **arguments)
    jax.eval_shape(attend, *inputs(q_len=96, kv_len=96))
    query, key = np.arange(96)[:, None], np.arange(96)
    pairs = (query >= key) | (not arguments.get("causal", True))
    pairs = pairs & (query - key < arguments.get("window", 96))
    np.testing.assert_array_equal(tables[0], pairs.reshape(3, 32, 4, 24).any(axis=(1, 3)))


def test_long_sequences_never_hold_the_score_matrix():
    q, k, v = (jax.ShapeDtypeStruct((1, 4096, heads, HEAD_DIM), jnp.float32) for heads in (2, 1, 1))

    def loss(q, k, v):
        return jnp.sum(kernels.flash_attention(q, k, v, implementation="xla") ** 2)

    memory = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.15 * (2 * 4096 * 4096 * 4)


def test_decoding_against_a_cache_equals_the_full_pass():
    q, k, v = inputs(q_len=40, kv_len=40)
    full = jax.jit(functools.partial(kernels.flash_attention, implementation="xla"))(q, k, v)
    cache = [jnp.concatenate([x, jnp.full((BATCH, 24, *x.shape[2:]), 100.0)], axis=1) for x in (k, v)]
    step = jax.jit(functools.partial(kernels.flash_attention, implementation="xla"))
    for position in (0, 17, 39):
        at = jnp.full(BATCH, position)
        out = step(q[:, position : position + 1], *cache, q_offset=at, kv_lengths=at + 1)
        assert_close(out, full[:, position : position + 1], jnp.float32, f"position {position}")


@pytest.mark.parametrize("regime", ["reference", "short", "pallas_tpu"])
def test_quantised_keys_and_values_carry_their_scales(regime, monkeypatch):
    shrink(monkeypatch, regime)
    q, k, v = inputs()
    scales = [jnp.max(jnp.abs(x), axis=-1) / 127 for x in (k, v)]
    stored = [jnp.round(x / s[..., None]).astype(jnp.int8) for x, s in zip((k, v), scales, strict=True)]
    out = kernels.flash_attention(q, *stored, k_scale=scales[0], v_scale=scales[1], **FORMS[regime])
    restored = [x * s[..., None] for x, s in zip(stored, scales, strict=True)]
    want = kernels.flash_attention(q, *restored, implementation="reference")
    assert_close(out, want, jnp.float32, "out")


def test_under_checkpoint_and_scan():
    q, k, v = inputs(q_len=20, kv_len=20)

    def layer(x, scale):
        return kernels.flash_attention(x * scale, k, v, implementation="xla"), None

    def scanned(q):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), q, jnp.asarray([0.5, 2.0]))[0] ** 2)

    def unrolled(q):
        return jnp.sum(layer(layer(q, 0.5)[0], 2.0)[0] ** 2)

    assert_close(jax.jit(jax.grad(scanned))(q), jax.jit(jax.grad(unrolled))(q), jnp.float32, "gradient")


def test_vmap(form):
    q, k, v = inputs(q_len=50, kv_len=50)

    def loss(q, k, v):
        return jnp.sum(kernels.flash_attention(q[None], k[None], v[None], **FORMS[form]) ** 2)

    mapped = jax.jit(jax.vmap(jax.grad(loss)))(q, k, v)
    one_by_one = jax.jit(jax.grad(loss))
    assert_close(mapped, jnp.stack([one_by_one(*row) for row in zip(q, k, v, strict=True)]), jnp.float32, "vmap")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "flashy"}, "implementation='flashy' is not one of 'pallas_tpu', 'reference', 'xla'; use"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"softcap": -1.0}, "softcap=-1.0 must be a positive number"),
        ({"dropout_rate": 1.0}, r"dropout_rate=1.0 must be in \[0, 1\)"),
        ({"dropout_rate": 0.5}, "dropout_rate=0.5 needs dropout_key"),
        (
            {"mask": jnp.ones((3, 9), bool)},
            r"mask has shape \[3, 9\], expected one that broadcasts to .* \[2, 4, 75, 75\]",
        ),
        ({"interpret": True}, "interpret=True has no meaning for implementation 'xla'"),
    ],
)
def test_impossible_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.flash_attention(*inputs(), **change)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="heads=4 must be a multiple of kv_heads=3"):
        kernels.flash_attention(*inputs(kv_heads=3))
    with pytest.raises(ValueError, match="q_len=30 and kv_len=75; pass the pair"):
        kernels.flash_attention(*inputs(q_len=30), segment_ids=SEGMENTS[:, :30])
    q, k, v = inputs()
    with pytest.raises(ValueError, match="k_scale=None, but k and v are int8"):
        kernels.flash_attention(q, k.astype(jnp.int8), v.astype(jnp.int8))
