"""Small settings and random packed batches that several tests share."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from vishwamai_eqx.config import PRESETS, Config
from vishwamai_eqx.data import Batch

VOCAB = 96
MIXED = {"data": 2, "expert": 2, "model": 2}
# Of cases that differ by their mesh alone the default suite takes one of each kind; the others are slow tests.
rarely = functools.partial(pytest.param, marks=pytest.mark.slow)


def small(*, optim: dict[str, Any] | None = None, **model: Any) -> Config:
    """Preset tiny made small: every part is still on."""
    tiny = PRESETS["tiny"]
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    shape |= {"ffn_dim": 24, "max_seq_len": 16, "scan_unroll": 1}
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, **{**shape, **model}),
        optim=dataclasses.replace(tiny.optim, **{"batch_size": 16, "steps": 40, "warmup_steps": 2, **(optim or {})}),
    )


def random_batch(rows: int, seq: int, seed: int) -> Batch:
    """Rows of two or three documents and some padding, of random tokens."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(4, VOCAB, (2, rows, seq), dtype=np.int32)
    segment_ids, positions = np.zeros((2, rows, seq), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(1, seq), 3, replace=False))
        for segment, (start, end) in enumerate(zip([0, *cuts[:2]], cuts, strict=True), 1):
            segment_ids[row, start:end] = segment
            positions[row, start:end] = np.arange(end - start)
    return Batch(tokens, targets, segment_ids, positions)


def worst(a: object, b: object) -> float:
    """The largest difference between two trees, relative to the largest number of each pair; NaN if there is one."""
    differences = jax.tree.map(
        lambda x, y: np.max(np.abs(x - y), initial=0) / max(np.max(np.abs(x), initial=0), 1e-30), a, b
    )
    return float(np.max(jax.tree.leaves(differences)))
