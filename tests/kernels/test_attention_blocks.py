"""What the TPU kernels of flash attention visit, and the sizes of their blocks: no kernel runs here."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.flash_attention import api
from kernels.flash_attention.pallas_blocks import BlockSizes, default_blocks
from kernels.flash_attention.pallas_tables import DIAGONAL, FIRST, FULL, LAST, MASKED, kv_block, q_block, schedule
from kernels.flash_attention.problem import Operands, Settings
from kernels.flash_attention.reference import _visible
from kernels.tpu import GENERATIONS
from tests.kernels.comparison import normal

BATCH = 2
NOTHING = Operands(None, None, None, None, None, None, None, (np.zeros((), np.int32), np.zeros((), np.int32)))


@settings(max_examples=25)
@given(data=st.data())
def test_tables_name_exactly_the_blocks_that_are_seen(data):
    def draw(strategy, label):
        return data.draw(strategy, label=label)

    def row(low, high, label):
        values = st.none() | st.lists(st.integers(low, high), min_size=BATCH, max_size=BATCH).map(jnp.asarray)
        return draw(values, label)

    # A few shapes only: each is compiled, operation by operation.
    q_len, kv_len, q_size, kv_size, size = draw(
        st.sampled_from([(24, 40, 8, 16, 8), (40, 24, 16, 8, 4), (33, 33, 8, 8, 13)]), "shapes"
    )
    generator = np.random.default_rng(draw(st.integers(0, 99), "seed"))
    block_mask = generator.random((-(-q_len // size), -(-kv_len // size))) < 0.6
    known, traced = draw(st.sampled_from([(None, None), (True, None), (None, True)]), "block mask")
    problem = Settings(
        scale=1.0,
        causal=draw(st.booleans(), "causal"),
        window=draw(st.none() | st.integers(1, 20), "window"),
        softcap=None,
        dropout_rate=0.0,
        block_size=size,
        block_mask=tuple(map(tuple, block_mask.tolist())) if known else None,
    )
    segmented = draw(st.booleans(), "segments")
    operands = Operands(
        q_segment_ids=jnp.asarray(np.sort(generator.integers(0, 3, (BATCH, q_len)))) if segmented else None,
        kv_segment_ids=jnp.asarray(np.sort(generator.integers(0, 3, (BATCH, kv_len)))) if segmented else None,
        mask=None,
        block_mask=jnp.asarray(block_mask) if traced else None,
        q_offset=row(0, 20, "q_offset"),
        kv_lengths=row(0, kv_len, "kv_lengths"),
        dropout_key=None,
        dropout_offset=(jnp.asarray(0), jnp.asarray(0)),
    )
    table = schedule((q_len, kv_len), (q_size, kv_size), operands, problem, (0, kv_len))
    visible = np.asarray(_visible(BATCH, q_len, kv_len, operands, problem))[:, 0]
    for b in range(BATCH):
        words = np.asarray(table.words).reshape(table.rows, -1)[min(b, table.rows - 1)][: int(table.steps)]
        computed = [word for word in words if word & (FULL | MASKED | DIAGONAL)]
        blocks = [(int(q_block(word)), int(kv_block(word))) for word in computed]
        assert blocks == sorted(set(blocks))
        for i, j in np.ndindex(-(-q_len // q_size), -(-kv_len // kv_size)):
            block = visible[b, i * q_size : (i + 1) * q_size, j * kv_size : (j + 1) * kv_size]
            if (i, j) not in blocks:
                assert not block.any(), (i, j)
                continue
            word = computed[blocks.index((i, j))]
            assert not word & FULL or (block.all() and block.shape[1] == kv_size), (i, j)
            # Ranges of positions are exact; those of segments, windows with lengths, and block masks are bounds.
            bounded = segmented or known or traced or (problem.window is not None and operands.kv_lengths is not None)
            if not bounded:
                assert block.any() and (word & FULL or not block.all() or block.shape[1] < kv_size), (i, j)
        # Every block of queries begins and ends once, in that order, whether or not anything is seen.
        marks = [(int(q_block(w)), int(w & (FIRST | LAST))) for w in words if w & (FIRST | LAST)]
        for i in range(-(-q_len // q_size)):
            assert [mark for at, mark in marks if at == i] in ([FIRST | LAST], [FIRST, LAST])
        assert {int(w & (FULL | MASKED | DIAGONAL)) for w in computed} <= set(table.kinds)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, *range(1, 20)])
def test_positions_alone_decide_exactly(causal, window):
    q_len, kv_len, size = 32, 40, 8
    table = schedule(
        (q_len, kv_len), (size, size), NOTHING, Settings(1.0, causal, window, None, 0.0, 128, None), (0, 40)
    )
    behind = np.arange(q_len)[:, None] - np.arange(kv_len)
    visible = ((behind >= 0) | (not causal)) & (behind < (window or q_len))
    blocks = visible.reshape(q_len // size, size, kv_len // size, size)
    words = [word for word in np.asarray(table.words) if word & (FULL | MASKED | DIAGONAL)]
    seen, full = np.zeros((2, q_len // size, kv_len // size), bool)
    for word in words:
        seen[q_block(word), kv_block(word)] = True
        full[q_block(word), kv_block(word)] = word & FULL
    np.testing.assert_array_equal(seen, blocks.any(axis=(1, 3)))
    np.testing.assert_array_equal(full, blocks.all(axis=(1, 3)))


def test_static_masks_make_static_tables_as_long_as_what_is_seen():
    causal = Settings(1.0, True, None, None, 0.0, 128, None)
    table = schedule((64, 64), (16, 16), NOTHING, causal, (0, 64))
    assert (table.steps, table.words.size, table.kinds) == (10, 10, (FULL, DIAGONAL))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("generation", GENERATIONS.values(), ids=lambda it: it.name)
def test_default_blocks_fit_every_generation(generation, dtype, head_dim):
    itemsize = jnp.dtype(dtype).itemsize if generation.bf16_dot else 4
    for masked, triangle in ((False, None), (True, None), (False, 1100), (False, 2048)):
        blocks = default_blocks(generation, head_dim, dtype, masked, triangle)
        blocks.check(generation, head_dim, itemsize, masked, 100_000)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (BlockSizes(q=100), "block size q=100 must be a positive multiple of 128; use 128"),
        (BlockSizes(kv=8192), r"q=1024, kv=8192 with head_dim=128 need .* MiB .* TPU v3 has 14.4 .* use smaller"),
        (BlockSizes(kv_resident=8192), r"kv_resident=8192 with head_dim=128 need .* use smaller"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(blocks, message):
    with pytest.raises(ValueError, match=message):
        blocks.check(GENERATIONS["v3"], 128, 4, False, 8192)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)), r"q has shape \[4, 2, 8\], expected 4 axes"),
        (((1, 4, 2, 8), (1, 4, 2, 16), (1, 4, 2, 16)), "must agree in batch and head_dim"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8)), "k and v in all axes"),
    ],
)
def test_shapes_that_disagree_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        api._check_shapes(*(normal(seed, shape) for seed, shape in enumerate(shapes)))
