"""Documents, packing and batches: nothing lost, nothing seen twice, the same everywhere."""

from pathlib import Path

import numpy as np
import pytest

from vishwamai_eqx import data
from vishwamai_eqx.config import DataConfig
from vishwamai_eqx.tokenizer import VishwamAITokenizer

SEQ_LEN = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "ünï", "漢字", "😀", "123", "  ", "def f(x):", "\n"]
    for index in range(60):
        length = int(rng.integers(1, 400 if index % 10 else 3000))
        text = f"{index} " + " ".join(rng.choice(words, length))
        (folder / f"{index:02}.txt").write_bytes(text.encode())
    # A copy under another name.
    (folder / "copy.txt").write_bytes((folder / "07.txt").read_bytes())
    return folder


@pytest.fixture(scope="module")
def corpus(folder, tmp_path_factory) -> data.Corpus:
    return data.load_documents(
        DataConfig(files=(f"{folder}/*.txt",), held_out_share=0.2), cache_dir=tmp_path_factory.mktemp("index")
    )


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory) -> VishwamAITokenizer:
    return data.train_tokenizer(corpus, 340, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def dataset(corpus, tokenizer, tmp_path_factory) -> data.Dataset:
    cache = tmp_path_factory.mktemp("cache")
    return data.prepare(corpus, tokenizer, seq_len=SEQ_LEN, batch_size=4, seed=3, cache_dir=cache)


def stretches(batch: data.Batch):
    """Each segment's tokens with its last target, as tuples."""
    for tokens, targets, segments, positions in zip(*batch, strict=True):
        for segment in range(1, segments.max(initial=0) + 1):
            here = segments == segment
            np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
            np.testing.assert_array_equal(tokens[here][1:], targets[here][:-1])
            yield (*tokens[here].tolist(), int(targets[here][-1]))


def test_held_out_batches_predict_every_held_out_byte_once(dataset, corpus, folder, tokenizer):
    held = [corpus.files[i] for i in np.flatnonzero(corpus.held_out)]
    batches = list(dataset.held_out_batches(4))
    assert sum(dataset.source_bytes(batch) for batch in batches) == dataset.held_out_bytes
    assert dataset.held_out_bytes == sum(path.stat().st_size for path in held)
    assert b"".join(dataset.held_out_text()) == b"".join(path.read_bytes() for path in held)
    expected = []
    for path in held:
        ids = [tokenizer.bos_id, *tokenizer.encode_ids(path.read_bytes().decode()), tokenizer.eos_id]
        expected += [tuple(ids[start : start + SEQ_LEN + 1]) for start in range(0, len(ids) - 1, SEQ_LEN)]
    assert sorted(stretch for batch in batches for stretch in stretches(batch)) == sorted(expected)
    assert all(batch.tokens.shape == (4, SEQ_LEN) for batch in batches)


def test_an_epoch_shows_every_training_row_once_and_the_next_another_order(dataset, corpus):
    rows = sum(map(len, dataset.train_rows))
    epochs = [
        [tuple(dataset.batch(number // 4).tokens[number % 4]) for number in range(epoch * rows, (epoch + 1) * rows)]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    predicted = sum(rows.length.sum() for rows in dataset.train_rows)
    documents = (~corpus.held_out).sum()
    assert len(dataset.tokens) - np.diff(dataset.held_out_spans).sum() == predicted + documents


def test_part_of_a_batch_is_its_rows(dataset):
    whole, part = dataset.batch(5), dataset.batch(5, rows=slice(1, 3))
    for mine, theirs in zip(part, whole, strict=True):
        np.testing.assert_array_equal(mine, theirs[1:3])
    halves = [data.hash_lanes(dataset.batch(5, slice(at, at + 2))) for at in (0, 2)]
    np.testing.assert_array_equal(sum(halves), data.hash_lanes(whole))
    assert data.batch_hash(whole) != data.batch_hash(dataset.batch(6))
