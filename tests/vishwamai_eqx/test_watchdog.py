"""A hang is written down: who hangs where, and what the devices hold."""

import threading
import time

import jax.numpy as jnp

from vishwamai_eqx.watchdog import Watchdog


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_hang_is_written_once_and_again_after_a_step(tmp_path):
    events, release = [], threading.Event()

    def the_thread_that_hangs():
        release.wait(60)

    array = jnp.ones((321, 7))
    thread = threading.Thread(target=the_thread_that_hangs)
    thread.start()
    with Watchdog(
        tmp_path, minutes=0.2 / 60, on_event=lambda kind, message, step: events.append((kind, step, message))
    ) as watchdog:
        watchdog.step(4)
        wait_for(lambda: events)
        time.sleep(0.5)
        assert len(events) == 1
        watchdog.step(5)
        wait_for(lambda: len(events) == 2)
    release.set()
    thread.join()
    assert [event[:2] for event in events] == [("hang", 4), ("hang", 5)]
    assert events[0][2].endswith("see hang-step-4-process-0.txt")
    report = (tmp_path / "hang-step-4-process-0.txt").read_text()
    assert "after step 4" in report
    # Both the thread that hangs and the one that waits for it.
    assert "in the_thread_that_hangs" in report and "in test_a_hang_is_written_once" in report
    assert "cpu, " in report and " are not computed yet" in report
    assert array.nbytes <= int(report.split(" arrays of ")[1].split(" bytes")[0].replace(",", ""))


def test_steps_in_time_are_no_hang_and_0_watches_nothing(tmp_path):
    events = []
    with Watchdog(tmp_path, minutes=2 / 60, on_event=lambda *a, **k: events.append(a)) as watchdog:
        for step in range(30):
            time.sleep(0.02)
            watchdog.step(step)
    before = set(threading.enumerate())
    with Watchdog(tmp_path, minutes=0.0, on_event=lambda *a, **k: events.append(a)) as watchdog:
        assert set(threading.enumerate()) <= before
        watchdog.step(1)
    assert events == [] and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    events = []
    with Watchdog(tmp_path / "absent", minutes=0.1 / 60, on_event=lambda kind, message, step: events.append(message)):
        wait_for(lambda: events)
    assert "hang-step-0-process-0.txt could not be written" in events[0]
