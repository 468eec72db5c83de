"""Where time and memory went: laps leave nothing out, and what was done in vain is not in the steps' share."""

import mmap
import time

import pytest

from vishwamai_eqx import accounting
from vishwamai_eqx.accounting import Clock
from vishwamai_eqx.logbook import Logbook, connect


def test_laps_add_up():
    began = time.perf_counter()
    clock = Clock(began - 1)
    laps = [clock.lap() for _ in range(5)]
    assert laps[0] >= 1 and min(laps) >= 0
    assert abs(sum(laps) - 1 - (time.perf_counter() - began)) < 0.5


def test_goodput_counts_what_stands(tmp_path):
    """Steps 1 to 6, killed; steps 5 and 6 again, and on to 8."""
    with Logbook(tmp_path, 0) as log:
        log.span("start", 3.0)
        log.span("compile", 2.0)
        for step in range(2, 7):
            log.step(step=step, loss=1.0, data_seconds=0.25, step_seconds=1.0)
        log.span("save", 0.5, step=4)
    with Logbook(tmp_path, 4) as log:
        log.span("start", 3.0)
        for step in range(5, 9):
            log.step(step=step, loss=1.0, data_seconds=0.25, step_seconds=1.0)
    with connect(tmp_path) as connection:
        rows = connection.execute("SELECT name, seconds FROM goodput").fetchall()
        names = {name for (name,) in connection.execute("SELECT DISTINCT name FROM spans").fetchall()}
        (taken,) = connection.execute("SELECT sum(step_seconds) FROM steps").fetchone()
    # 2, 3 and 4 of the first attempt and four of the second.
    expected = {"step": 7.0, "start": 6.0, "repeated": 2.5, "compile": 2.0, "data": 1.75, "save": 0.5}
    assert dict(rows) == expected and list(dict(rows)) == list(expected)
    assert taken == 7.0
    assert names == {"start", "compile", "data", "step", "save"}
    said = accounting.goodput(tmp_path)
    assert said.startswith("goodput: 35.4% of 20 s in steps; start-up 30.4%, steps that a restart did again 12.7%")


def test_memory_is_counted():
    before, size = accounting.memory()["host"], 64 << 20
    # Pages that nothing else has used before.
    with mmap.mmap(-1, size) as held:
        for _ in range(64):
            held.write(bytes(1 << 20).replace(b"\0", b"x"))
        assert accounting.memory()["host"] - before == pytest.approx(size, rel=0.3)
