"""Batches: nothing lost, nothing seen twice, the same everywhere."""

import dataclasses
import gzip
import threading
from pathlib import Path

import jax
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
        (folder / f"{'ab'[index % 2]}{index:02}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(folder, cache) -> data.Corpus:
    return data.load_documents(DataConfig(files=(f"{folder}/*.txt",), held_out_share=0.2), cache_dir=cache)


@pytest.fixture(scope="module")
def tokenizer(corpus, cache) -> VishwamAITokenizer:
    return VishwamAITokenizer.train(corpus.training_text(10**8), 340, cache / "tokenizer")


def prepare(corpus, tokenizer, cache, seed=3, batch_size=4) -> data.Dataset:
    return data.prepare(corpus, tokenizer, seq_len=SEQ_LEN, batch_size=batch_size, seed=seed, cache_dir=cache)


@pytest.fixture(scope="module")
def dataset(corpus, tokenizer, cache) -> data.Dataset:
    return prepare(corpus, tokenizer, cache)


def stretches(batch: data.Batch):
    """Each segment's tokens with its last target, as tuples."""
    for tokens, targets, segments, positions in zip(*batch, strict=True):
        assert (np.diff(segments[segments > 0]) >= 0).all() and not tokens[segments == 0].any()
        for segment in range(1, segments.max(initial=0) + 1):
            here = segments == segment
            np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
            np.testing.assert_array_equal(tokens[here][1:], targets[here][:-1])
            yield (*tokens[here].tolist(), int(targets[here][-1]))


def test_held_out_batches_predict_every_held_out_byte_once(dataset, corpus, tokenizer):
    held = [corpus.files[i] for i in np.flatnonzero(corpus.held_out)]
    batches = list(dataset.held_out_batches(5))
    assert sum(dataset.source_bytes(batch) for batch in batches) == dataset.held_out_bytes
    assert dataset.held_out_bytes == sum(path.stat().st_size for path in held)
    assert b"".join(dataset.held_out_text()) == b"".join(path.read_bytes() for path in held)
    expected = []
    for path in held:
        ids = [tokenizer.bos_id, *tokenizer.encode_ids(path.read_bytes().decode()), tokenizer.eos_id]
        expected += [tuple(ids[start : start + SEQ_LEN + 1]) for start in range(0, len(ids) - 1, SEQ_LEN)]
    assert sorted(stretch for batch in batches for stretch in stretches(batch)) == sorted(expected)
    assert all(field.shape == (5, SEQ_LEN) and field.dtype == np.int32 for batch in batches for field in batch)
    few = list(dataset.held_out_batches(5, limit=7))
    assert [int((batch.segment_ids[:, 0] > 0).sum()) for batch in few] == [5, 2]


def test_an_epoch_shows_every_training_row_once_and_the_next_another_order(dataset, corpus):
    (rows,) = dataset.train_rows
    epochs = [
        [tuple(dataset.batch(n // 4).tokens[n % 4]) for n in range(epoch * len(rows), (epoch + 1) * len(rows))]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    held_out = np.diff(dataset.held_out_spans).sum()
    assert len(dataset.tokens) - held_out == rows.length.sum() + (~corpus.held_out).sum()
    assert dataset.batches_per_epoch == len(rows) / 4


def test_held_out_rows_come_in_an_order_of_their_own(dataset):
    """A few of them are a sample of all documents, not the first ones."""
    starts = dataset.held_out_rows.start[dataset.held_out_rows.first[:-1]]
    assert len(starts) > 20 and (np.diff(starts) < 0).sum() > len(starts) / 4


def test_another_choice_of_what_is_held_out_is_another_data_set(dataset, corpus, tokenizer, cache):
    other = dataclasses.replace(corpus, held_out=np.roll(corpus.held_out, 1))
    assert prepare(other, tokenizer, cache).fingerprint != dataset.fingerprint


def test_a_batch_is_a_function_of_seed_and_number(dataset, corpus, tokenizer, cache):
    """In any order, from any thread, after any restart."""
    hashes = [data.batch_hash(dataset.batch(n)) for n in range(40)]
    assert len(set(hashes)) == 40
    again = prepare(corpus, tokenizer, cache)
    assert again.fingerprint == dataset.fingerprint
    found: dict[int, str] = {}

    def work(numbers):
        for n in numbers:
            found[n] = data.batch_hash(again.batch(n))

    threads = [threading.Thread(target=work, args=(range(39 - k, -1, -3),)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(40)] == hashes
    other = prepare(corpus, tokenizer, cache, seed=4)
    assert other.fingerprint != dataset.fingerprint
    assert not {data.batch_hash(other.batch(n)) for n in range(40)} & set(hashes)


def test_part_of_a_batch_is_its_rows(dataset):
    whole, part = dataset.batch(5), dataset.batch(5, rows=slice(1, 3))
    for mine, theirs in zip(part, whole, strict=True):
        np.testing.assert_array_equal(mine, theirs[1:3])
    halves = [data.hash_lanes(dataset.batch(5, slice(at, at + 2))) for at in (0, 2)]
    np.testing.assert_array_equal(sum(halves), data.hash_lanes(whole))


def test_a_hash_sees_every_number_and_not_where_rows_lie(dataset):
    batch = dataset.batch(0)
    name = data.batch_hash(batch)
    assert data.batch_hash(data.Batch(*(field[::-1] for field in batch))) == name
    assert data.batch_hash(data.Batch(*(field.reshape(2, 2, SEQ_LEN) for field in batch))) == name
    assert data.batch_hash(data.Batch(*map(jax.numpy.asarray, batch))) == name
    for number in range(4):
        for row, column in ((0, 0), (3, SEQ_LEN - 1), (1, 7)):
            changed = [field.copy() for field in batch]
            changed[number][row, column] += 1
            assert data.batch_hash(data.Batch(*changed)) != name
    # Columns that change places, all that stands in them together.
    columns = np.roll(np.arange(SEQ_LEN), 1)
    assert data.batch_hash(data.Batch(*(field[:, columns] for field in batch))) != name


def test_weights_decide_what_share_of_the_rows_a_source_gives(folder, tokenizer, cache):
    settings = DataConfig(files=(f"{folder}/a*.txt", f"{folder}/b*.txt"), held_out_share=0.2, weights=(3.0, 1.0))
    corpus = data.load_documents(settings, cache_dir=cache)
    mixed = prepare(corpus, tokenizer, cache, batch_size=8)
    a_rows, b_rows = (
        {tuple(data._row(mixed.tokens, rows, number, SEQ_LEN)[0]) for number in range(len(rows))}
        for rows in mixed.train_rows
    )
    seen = [tuple(row) for n in range(100) for row in mixed.batch(n).tokens]
    assert sum(row in a_rows for row in seen) == 600 and sum(row in b_rows for row in seen) == 200
    # Of the two it is the heavier one that comes round first.
    assert set(seen) >= b_rows or set(seen) >= a_rows
    even = dataclasses.replace(settings, weights=())
    assert len(prepare(data.load_documents(even, cache_dir=cache), tokenizer, cache).train_rows) == 1
    for weights in ((1.0, 3.0), ()):
        other = data.load_documents(dataclasses.replace(settings, weights=weights), cache_dir=cache)
        assert prepare(other, tokenizer, cache, batch_size=8).fingerprint != mixed.fingerprint


def test_gzip_is_gzips_own_figure(dataset):
    text = b"".join(dataset.held_out_text())
    assert data.gzip_bits_per_byte(dataset.held_out_text()) == 8 * len(gzip.compress(text, 9)) / len(text)


def test_rows_are_full(dataset):
    (rows,) = dataset.train_rows
    assert 1 - rows.length.sum() / (len(rows) * SEQ_LEN) < 0.03
