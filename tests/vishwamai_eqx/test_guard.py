"""Signals: the first asks, the second ends, and neither waits for what the main thread is doing."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from jax.experimental import multihost_utils

from vishwamai_eqx import guard
from vishwamai_eqx.guard import Refusals, Signals

# The children import the file alone: the package brings jax, and seconds.
ALONE = {**os.environ, "PYTHONPATH": os.path.dirname(guard.__file__)}
# The main thread polls, as a training loop does, and says what it saw.
LOOP = """
import sys, time
from guard import Signals
with Signals() as signals:
    print("ready", flush=True)
    while not signals.received:
        time.sleep(0.01)
    print("saved", flush=True)
sys.exit(signals.exit_code)
"""
# The main thread is in a call that lets go of the interpreter and never comes back to it, as a hung device makes it.
STUCK = """
import hashlib
from guard import Signals
with Signals() as signals:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def start(program):
    run = subprocess.Popen(
        [sys.executable, "-c", program], env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "ready\n"
    return run


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_lets_the_loop_save(number, code):
    run = start(LOOP)
    run.send_signal(number)
    out, err = run.communicate(timeout=30)
    assert (out, run.returncode) == ("saved\n", code)
    assert err.startswith(f"{number.name}: saving")


def test_a_second_signal_ends_even_a_main_thread_that_hangs():
    run = start(STUCK)
    run.send_signal(signal.SIGINT)
    assert run.stderr.readline().startswith("SIGINT: saving")
    time.sleep(0.1)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=10)
    assert run.returncode == 143
    assert "SIGTERM again" in err


def test_what_was_there_before_is_restored(capfd):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("before"))
    try:
        # Threads of other tests may end while this one runs.
        threads = set(threading.enumerate())
        with Signals() as signals:
            assert signals.received is None and signals.exit_code == 0
            signal.raise_signal(signal.SIGTERM)
            for _ in range(500):
                if signals.received:
                    break
                time.sleep(0.01)
            assert signals.received is signal.SIGTERM and signals.exit_code == 143
        assert set(threading.enumerate()) <= threads
        assert seen == []
        signal.raise_signal(signal.SIGTERM)
        assert seen == ["before"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_notice_of_preemption_stops_all_processes_at_its_step(monkeypatch):
    """As jax has it from the scheduler: true in every process at one step, which need not be an eighth."""
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 5)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda received: received)
    with Signals(2) as signals:
        assert [signals.stop(step) for step in range(1, 6)] == [False] * 4 + [True]
        assert signals.received is signal.SIGTERM and signals.exit_code == 143
    with Signals(1) as signals:
        assert not signals.stop(5)


def test_while_there_is_nothing_to_save_the_first_signal_ends_it():
    run = start(STUCK.replace("Signals()", "Signals(waits=False)"))
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=10)
    assert (err, run.returncode) == ("SIGINT: exiting\n", 130)


def test_from_the_first_step_on_a_value_error_is_no_refusal():
    with pytest.raises(ValueError, match="other data"), Refusals():
        raise ValueError("other data")
    with pytest.raises(RuntimeError, match="the run failed: a shape") as failure, Refusals() as refusals:
        refusals.end()
        raise ValueError("a shape")
    assert isinstance(failure.value.__cause__, ValueError)
