"""The logbook: one row a step however often a run was resumed, readable at any time, torn by nothing."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import duckdb
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vishwamai_eqx import logbook
from vishwamai_eqx.logbook import Logbook, connect, write_views

VIEWS = ("steps", "evals", "events", "samples", "experts", "memory", "spans", "goodput", "attempts")
COLUMNS = {
    "steps": ["step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "batch_hash"],
    "evals": ["step", "loss", "bits_per_byte"],
    "events": ["time", "step", "kind", "message"],
}


def losses(run_dir):
    with connect(run_dir) as connection:
        return dict(connection.execute("SELECT step, loss FROM steps").fetchall())


def segments(run_dir):
    return sorted((run_dir / "metrics").glob("*.jsonl"))


def client(path, query, cwd):
    """What another process, somewhere else, gets from the file of views."""
    program = "import duckdb, sys; print(duckdb.connect(sys.argv[1]).execute(sys.argv[2]).fetchall())"
    command = [sys.executable, "-c", program, str(path), query]
    return eval(subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout)


def test_every_view_answers_before_its_first_row(tmp_path):
    with Logbook(tmp_path / "run", 0), connect(tmp_path / "run") as connection:
        for view in VIEWS:
            rows = connection.execute(f"SELECT * FROM {view}")
            names = [column[0] for column in rows.description]
            assert names[: len(COLUMNS.get(view, []))] == COLUMNS.get(view, [])
            assert len(rows.fetchall()) == (view == "attempts")


def test_a_client_elsewhere_reads_while_the_run_goes_on(tmp_path):
    run_dir = tmp_path / "it's a run"
    with Logbook(run_dir, 0) as log:
        log.step(step=1, loss=2.5, batch_hash="c0ffee")
        log.flush()
        query = "SELECT step, loss, batch_hash FROM steps"
        assert client(run_dir / "metrics.duckdb", query, cwd="/") == [(1, 2.5, "c0ffee")]
        log.step(step=2, loss=2.25)
        log.flush()
        assert client(run_dir / "metrics.duckdb", query, cwd=tmp_path)[1] == (2, 2.25, None)


def test_a_client_that_has_the_file_open_stops_no_restart(tmp_path):
    with Logbook(tmp_path, 0) as log:
        log.step(step=1, loss=1.0)
    program = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "metrics.duckdb"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"open\n"
        with Logbook(tmp_path, 1) as log:
            log.step(step=2, loss=2.0)
        assert losses(tmp_path) == {1: 1.0, 2: 2.0}
        holder.stdin.close()


def test_a_resume_takes_back_what_came_after(tmp_path):
    with Logbook(tmp_path, 0) as log:
        for step in range(1, 8):
            log.step(step=step, loss=float(step))
            log.sample(step, f"first {step}")
            log.experts(step, [[0.5, 0.5]])
        log.eval(step=4, loss=1.0, bits_per_byte=2.0)
        log.eval(step=6, loss=1.0, bits_per_byte=2.0)
        log.event("checkpoint", "saved", step=4)
    with Logbook(tmp_path, 4) as log:
        log.step(step=5, loss=50.0)
        log.sample(5, "second")
        log.sample(5, "third")
        log.event("start", "again")
    assert losses(tmp_path) == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 50.0}
    with connect(tmp_path) as connection:
        assert connection.execute("SELECT step FROM evals").fetchall() == [(4,)]
        texts = connection.execute("SELECT text FROM samples WHERE step > 3").fetchall()
        assert texts == [("first 4",), ("second",), ("third",)]
        assert connection.execute("SELECT max(step) FROM experts").fetchall() == [(4,)]
        # What happened is not taken back.
        assert connection.execute("SELECT kind FROM events").fetchall() == [("checkpoint",), ("start",)]
        assert connection.execute("SELECT resumed_at FROM attempts").fetchall() == [(0,), (4,)]


@settings(max_examples=8)
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 6), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_the_views_show_the_history_that_a_dictionary_would(tmp_path_factory, attempts):
    """Each attempt resumes at a step that exists, in a process of its own or the same one, and does some steps."""
    run_dir, history, log = tmp_path_factory.mktemp("run"), {}, None
    for number, (at, count, same_process) in enumerate(attempts):
        at = min(at, max(history, default=0))
        if log is not None and same_process:
            log.resume(at)
        else:
            if log is not None:
                log.close()
            log = Logbook(run_dir, at)
        history = {step: loss for step, loss in history.items() if step <= at}
        for step in range(at + 1, at + 1 + count):
            history[step] = float(100 * number + step)
            log.step(step=step, loss=history[step])
    log.close()
    assert losses(run_dir) == history


def test_a_step_logged_twice_is_one_row_the_later(tmp_path):
    with Logbook(tmp_path, 0) as log:
        log.step(step=1, loss=1.0)
        log.step(step=1, loss=2.0)
    assert losses(tmp_path) == {1: 2.0}


def test_events_may_come_before_it_is_known_where_the_run_resumes(tmp_path):
    with Logbook(tmp_path, 0) as log:
        log.step(step=1, loss=1.0)
    with Logbook(tmp_path, configuration={"model": {"num_layers": 4}}, environment={"jax": "0"}) as log:
        log.event("checkpoint_damaged", "put aside")
        log.flush()
        assert losses(tmp_path) == {1: 1.0}
        log.resume(0)
        log.flush()
        assert losses(tmp_path) == {}
    with connect(tmp_path) as connection:
        layers = connection.execute("SELECT configuration->'model'->>'num_layers' FROM attempts").fetchall()
        assert layers == [(None,), ("4",), ("4",)]


def test_numbers_of_every_kind_come_back(tmp_path):
    with Logbook(tmp_path, 0) as log:
        log.step(step=1, loss=jnp.float32(1.5), grad_norm=np.float64("inf"), mfu=0.25, skipped=jnp.int32(3))
        log.step(step=2, loss=float("nan"), mfu=float("-inf"))
        log.experts(2, jnp.array([[0.25, 0.75], [1.0, float("nan")]]))
        log.sample(2, 'a "line"\nand ½ more \u2028')
        log.memory(2, "host", 1 << 40)
        log.span("save", 0.5, step=2)
    with connect(tmp_path) as connection:
        first, second = connection.execute("SELECT loss, grad_norm, more FROM steps").fetchall()
        assert first == (1.5, math.inf, {"mfu": 0.25, "skipped": 3.0})
        assert math.isnan(second[0]) and second[2] == {"mfu": -math.inf}
        experts = connection.execute("SELECT step, layer, expert, load FROM experts").fetchall()
        assert experts[:3] == [(2, 0, 0, 0.25), (2, 0, 1, 0.75), (2, 1, 0, 1.0)] and math.isnan(experts[3][3])
        assert connection.execute("SELECT text FROM samples").fetchall() == [('a "line"\nand ½ more \u2028',)]
        assert connection.execute("SELECT name, bytes FROM memory").fetchall() == [("host", 1 << 40)]
        assert connection.execute("SELECT name, seconds FROM spans").fetchall() == [("save", 0.5)]
        (written,) = connection.execute("SELECT epoch(time) FROM steps WHERE step = 1").fetchone()
        assert abs(written - time.time()) < 60


def test_a_row_that_cannot_be_read_costs_only_itself(tmp_path, caplog):
    gone = jnp.ones(3)
    gone.delete()
    with Logbook(tmp_path, 0) as log:
        log.experts(1, gone)
        log.step(step=1, loss=1.0)
    assert losses(tmp_path) == {1: 1.0}
    assert "a row of experts at step 1 is lost" in caplog.text


@pytest.mark.parametrize(
    "tail", [b'{"table": "steps", "attempt": 1, "step": 9, "lo', b"\x00" * 700, b"\xff\n{}\n[1]\n\n"]
)
def test_a_torn_end_hides_no_row(tmp_path, tail):
    with Logbook(tmp_path, 0) as log:
        log.step(step=1, loss=1.0)
    with open(segments(tmp_path)[0], "ab") as file:
        file.write(tail)
    assert losses(tmp_path) == {1: 1.0}
    with Logbook(tmp_path, 1) as log:
        log.step(step=2, loss=2.0)
    assert losses(tmp_path) == {1: 1.0, 2: 2.0}


def test_a_segment_torn_anywhere_is_a_prefix(tmp_path):
    with Logbook(tmp_path, 0) as log:
        for step in range(1, 6):
            log.step(step=step, loss=float(step))
    segment = segments(tmp_path)[0]
    whole = segment.read_bytes()
    for length in range(0, len(whole), 37):
        segment.write_bytes(whole[:length])
        assert list(losses(tmp_path)) == list(range(1, whole[:length].count(b"\n")))


def test_a_disk_that_is_full_for_a_while_loses_no_row(tmp_path, monkeypatch, caplog):
    real, budget = os.write, [10**9]

    def write(file, data):
        if budget[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(file, data[: budget[0]])
        budget[0] -= count
        return count

    monkeypatch.setattr(logbook.os, "write", write)
    with Logbook(tmp_path, 0) as log:
        log.flush()
        for step in range(1, 41):
            # Room for a part of a line, for one and a part, and so on.
            budget[0] = step * 23 % 400 if step % 8 else 10**9
            log.step(step=step, loss=float(step))
            log.flush()
        budget[0] = 10**9
    assert losses(tmp_path) == {step: float(step) for step in range(1, 41)}
    assert "No space left" in caplog.text


def test_kill_loses_the_last_moment_at_most(tmp_path):
    program = """
import sys
from logbook import Logbook
log = Logbook(sys.argv[1], 0)
for step in range(1, 10**9):
    log.step(step=step, loss=float(step))
    if step % 100 == 0:
        log.flush()
        print(step, flush=True)
"""
    # The file alone: the package brings jax, and seconds.
    alone = {**os.environ, "PYTHONPATH": os.path.dirname(logbook.__file__)}
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], env=alone, stdout=subprocess.PIPE) as run:
        for _ in range(10):
            written = int(run.stdout.readline())
        run.send_signal(signal.SIGKILL)
        written = max([written, *map(int, run.stdout.read().split())])
    found = losses(tmp_path)
    assert len(found) >= written
    assert found == {step: float(step) for step in range(1, len(found) + 1)}


def test_ten_readers_lose_no_row(tmp_path):
    program = """
import sys, duckdb
seen = 0
while seen < 600:
    with duckdb.connect(sys.argv[1], read_only=True) as connection:
        steps = [row[0] for row in connection.execute("SELECT step FROM steps").fetchall()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= seen, (seen, steps)
    seen = len(steps)
"""
    with Logbook(tmp_path, 0) as log:
        command = [sys.executable, "-c", program, tmp_path / "metrics.duckdb"]
        readers = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(10)]
        for step in range(1, 601):
            log.step(step=step, loss=1.0, batch_hash="0" * 16)
            time.sleep(0.002)
        log.flush()
        for reader in readers:
            _, errors = reader.communicate(timeout=60)
            assert reader.returncode == 0, errors.decode()


def test_a_row_never_waits_for_the_disk(tmp_path, monkeypatch):
    real, disk = os.write, threading.Event()

    def write(file, data):
        disk.wait()
        return real(file, data)

    with Logbook(tmp_path, 0) as log:
        log.flush()
        monkeypatch.setattr(logbook.os, "write", write)
        for step in range(1, 50):
            log.step(step=step, loss=1.0)
        assert losses(tmp_path) == {}
        disk.set()
    assert len(losses(tmp_path)) == 49


def test_the_folder_can_be_moved(tmp_path):
    with Logbook(tmp_path / "old", 0) as log:
        log.step(step=1, loss=1.0)
    # A name that as a pattern would match another.
    moved = tmp_path / "new[1]*"
    (tmp_path / "old").rename(moved)
    assert losses(moved) == {1: 1.0}
    write_views(moved)
    with duckdb.connect(str(moved / "metrics.duckdb"), read_only=True) as connection:
        assert connection.execute("SELECT loss FROM steps").fetchall() == [(1.0,)]
    assert {path.name for path in moved.iterdir()} == {"metrics", "metrics.duckdb"}


@pytest.mark.parametrize("mend", [write_views, lambda run_dir: Logbook(run_dir, 1).close()])
def test_a_copy_reads_its_own_rows_from_its_next_start_on(tmp_path, mend):
    with Logbook(tmp_path / "original", 0) as log:
        log.step(step=1, loss=1.0)
    copied = shutil.copytree(tmp_path / "original", tmp_path / "copied")
    with Logbook(tmp_path / "original", 1) as log:
        log.step(step=2, loss=2.0)
    assert losses(copied) == {1: 1.0}
    mend(copied)
    for run_dir, steps in ((copied, [(1,)]), (tmp_path / "original", [(1,), (2,)])):
        with duckdb.connect(str(run_dir / "metrics.duckdb"), read_only=True) as connection:
            assert connection.execute("SELECT step FROM steps").fetchall() == steps


def test_only_process_0_writes(tmp_path):
    with Logbook(tmp_path / "run", 0, process=1) as log:
        log.step(step=1, loss=1.0)
        log.resume(0)
        log.flush()
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be the folder of a run"):
        connect(tmp_path)


def test_a_line_is_json(tmp_path):
    with Logbook(tmp_path, 0) as log:
        log.step(step=1, loss=float("nan"), batch_hash="c0ffee")
    lines = [json.loads(line) for line in Path(segments(tmp_path)[0]).read_text().splitlines()]
    assert [line["table"] for line in lines] == ["attempts", "steps"]
    assert lines[1]["loss"] == "nan" and lines[1]["batch_hash"] == "c0ffee"
