"""The feed: the same batches for any number of devices, processes and workers, ahead of time."""

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vishwamai_eqx import data, feed
from vishwamai_eqx.config import DataConfig
from vishwamai_eqx.feed import Feed, place
from vishwamai_eqx.tokenizer import VishwamAITokenizer

SPEC = PartitionSpec(None, "data", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for index in range(60):
        (folder / f"{index:02}.txt").write_text(" ".join(rng.choice(["human", "beings", "12", "\n"], 10 * index + 5)))
    return folder


@pytest.fixture(scope="module")
def dataset(folder) -> data.Dataset:
    corpus = data.load_documents(DataConfig(files=(f"{folder}/*.txt",), held_out_share=0.2), cache_dir=folder)
    tokenizer = VishwamAITokenizer(Path(__file__).parent / "huggingface")
    return data.prepare(corpus, tokenizer, seq_len=16, batch_size=16, seed=0, cache_dir=folder)


def sharding(devices: int, spec: PartitionSpec = SPEC) -> NamedSharding:
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return NamedSharding(mesh, spec)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_devices_and_microbatches_see_the_same_batches(dataset, devices, microbatches):
    for n in (0, 7):
        host, placed = dataset.batch(n), place(dataset, n, sharding(devices), microbatches)
        for mine, theirs in zip(placed, host, strict=True):
            assert mine.sharding == sharding(devices)
            np.testing.assert_array_equal(np.asarray(mine), theirs.reshape(microbatches, -1, 16))
        assert data.batch_hash(placed) == data.batch_hash(host)


def test_batches_come_by_pinned_memory_where_there_is_some(dataset, monkeypatch):
    """CPU devices name such memory too, so the way through it can be gone here."""
    made, original = [], jax.make_array_from_callback

    def make(shape, sharding, callback):
        made.append(sharding.memory_kind)
        return original(shape, sharding, callback)

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    monkeypatch.setattr(feed, "_has_pinned_host", lambda device: True)
    placed = place(dataset, 3, sharding(4), 2)
    assert made == ["pinned_host"] * 4
    assert all(field.sharding.is_equivalent_to(sharding(4), 3) for field in placed)
    assert {field.sharding.memory_kind for field in placed} == {jax.devices()[0].default_memory().kind}
    assert data.batch_hash(placed) == data.batch_hash(dataset.batch(3))


def test_a_process_reads_only_the_rows_of_its_devices(dataset, monkeypatch):
    """Each device's rows are asked for once and by themselves: a process without a device never reads its rows."""
    asked = []
    original = data.Dataset.batch
    monkeypatch.setattr(
        data.Dataset, "batch", lambda self, n, rows=slice(None): asked.append(rows) or original(self, n, rows)
    )
    place(dataset, 0, sharding(4), 2)
    expected = [slice(micro * 8 + at, micro * 8 + at + 2) for at in range(0, 8, 2) for micro in range(2)]
    assert sorted(asked, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_workers_and_restarts_do_not_change_what_comes(dataset, workers):
    expected = [data.batch_hash(dataset.batch(n)) for n in range(12)]
    feed = Feed(dataset, range(12), sharding(2), workers=workers)
    assert [data.batch_hash(batch) for batch in feed] == expected
    resumed = Feed(dataset, range(5, 12), sharding(8), workers=workers)
    assert [data.batch_hash(batch) for batch in resumed] == expected[5:]


def test_batches_are_made_while_the_last_one_is_used(dataset, monkeypatch):
    original, second = data.Dataset.batch, threading.Event()

    def slow(self, n, rows=slice(None)):
        time.sleep(0.5)
        if n == 1:
            second.set()
        return original(self, n, rows)

    monkeypatch.setattr(data.Dataset, "batch", slow)
    feed = Feed(dataset, range(2), sharding(1), workers=1)
    batches = iter(feed)
    next(batches)
    assert feed.waited >= 0.5
    assert second.wait(30), "nobody makes the second batch while the first is used"
    next(batches)
    assert feed.waited < 0.5


def test_a_feed_that_is_left_early_lets_go_of_its_threads(dataset):
    before = set(threading.enumerate())
    batches = iter(Feed(dataset, range(1000), sharding(1)))
    next(batches)
    del batches
    deadline = time.monotonic() + 10
    while not set(threading.enumerate()) <= before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(threading.enumerate()) <= before


PROCESS = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pathlib import Path
from vishwamai_eqx import data
from vishwamai_eqx.config import DataConfig
from vishwamai_eqx.feed import Feed
from vishwamai_eqx.tokenizer import VishwamAITokenizer

folder, tokenizer = Path(sys.argv[3]), VishwamAITokenizer(sys.argv[4])
corpus = data.load_documents(DataConfig(files=(f"{folder}/*.txt",), held_out_share=0.2), cache_dir=folder)
dataset = data.prepare(corpus, tokenizer, seq_len=16, batch_size=16, seed=0, cache_dir=folder)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
feed = Feed(dataset, range(4), NamedSharding(mesh, PartitionSpec(None, "data", None)), microbatches=2)
for batch in feed:
    assert not batch.tokens.is_fully_addressable
    print(data.batch_hash(batch), flush=True)
"""


@pytest.mark.slow
def test_two_processes_see_the_same_batches(dataset, folder, tmp_path):
    """Both start at once on one cache, and neither has the other's devices."""
    for path in folder.glob("*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tokenizer = Path(__file__).parent / "huggingface"
    command = [sys.executable, "-c", PROCESS, str(port)]
    processes = [
        subprocess.Popen(
            [*command, str(number), str(tmp_path), str(tokenizer)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    expected = [data.batch_hash(dataset.batch(n)) for n in range(4)]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert [line for line in output.split("\n") if len(line) == 16] == expected


def test_an_error_reaches_the_loop(dataset, monkeypatch):
    def broken(self, n, rows=slice(None)):
        raise ValueError("no such row")

    monkeypatch.setattr(data.Dataset, "batch", broken)
    with pytest.raises(ValueError, match="no such row"):
        next(iter(Feed(dataset, range(3), sharding(1))))
