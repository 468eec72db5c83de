"""Relations of tokens in the words of their definition, and a layer's own queries, keys and values."""

import jax
import jax.numpy as jnp
import numpy as np

from vishwamai_eqx import relations
from vishwamai_eqx.gemma import Decoder
from vishwamai_eqx.gemma_config import GemmaConfig
from vishwamai_eqx.model import VishwamAI


def plain(mine, theirs, segments, known, heads):
    total = 0.0
    for b in range(len(segments)):
        for a, t in zip(mine, theirs, strict=True):
            for head in range(heads):
                parts = [np.split(np.asarray(each[b], np.float64), heads, axis=-1)[head] for each in (t, a)]
                for q in np.flatnonzero(known[b]):
                    seen = [k for k in range(q + 1) if known[b, k] and segments[b, k] == segments[b, q]]
                    p, s = (np.exp(each[seen] @ each[q] / np.sqrt(each.shape[-1])) for each in parts)
                    p, s = p / p.sum(), s / s.sum()
                    total += np.sum(p * np.log(p / s))
    return total / (heads * len(mine))


def test_divergence_is_that_of_its_definition():
    rng, heads = np.random.default_rng(0), 2
    mine = [jnp.asarray(rng.normal(size=(2, 7, width)), jnp.float32) for width in (8, 4, 4)]
    theirs = [jnp.asarray(rng.normal(size=(2, 7, width)), jnp.float32) for width in (12, 12, 12)]
    segments = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)
    known = (rng.random((2, 7)) < 0.8) & (segments > 0)
    where = jnp.asarray(segments), jnp.asarray(known)
    run = jax.jit(jax.value_and_grad(lambda m, t: relations.divergence(m, t, *where, heads), (0, 1)))
    value, (gradients, of_teacher) = run(mine, theirs)
    np.testing.assert_allclose(value, plain(mine, theirs, segments, known, heads), rtol=1e-5)
    assert not any(np.asarray(each).any() for each in of_teacher)
    assert all(np.isfinite(each).all() and not np.asarray(each)[~known].any() for each in gradients)
    nudged = [mine[0] + 1e-3 * gradients[0], *mine[1:]]
    moved = float(run(nudged, theirs)[0] - value)
    np.testing.assert_allclose(moved, 1e-3 * float(jnp.square(gradients[0]).sum()), rtol=0.05)
    same = [theirs[0]] * 3
    assert abs(float(run(same, theirs[:1] * 3)[0])) < 1e-5


def test_projections_are_the_layers_own():
    """Of a layer's input; in Gemma also of the layers after the last whole period."""
    kinds = ("sliding_attention", "full_attention", "sliding_attention")
    described = GemmaConfig("gemma2", 32, 16, 24, 3, 2, 1, 8, layer_types=kinds, sliding_window=4)
    gemma = Decoder(described, key=jax.random.key(0))
    own = VishwamAI(32, 16, 3, 2, 1, 24, num_kv_heads=1, experts_per_token=1, key=jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (1, 5, 16))
    for layer in (1, 2, 3):
        blocks = own.blocks, (gemma.rest[0] if layer == 3 else gemma.period[layer - 1])
        for model, stack, index in zip((own, gemma), blocks, (layer - 1, 0), strict=True):
            block = jax.tree.map(lambda leaf: leaf[index], stack)  # noqa: B023
            normed = block.attention_norm(x)
            for found, linear in zip(
                relations.projected(model, None, layer, x), ("query", "key", "value"), strict=True
            ):
                np.testing.assert_allclose(found, getattr(block.attention, linear)(normed), rtol=1e-6)
