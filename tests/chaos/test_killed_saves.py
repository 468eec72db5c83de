"""A process that ends anywhere in a save, a prune or a row: the next one finds the last checkpoint, whole."""

import os
import threading

import pytest

from tests.chaos.victim import same, state
from vishwamai_eqx.checkpoint import Checkpoints, steps

OPERATIONS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


class Killed(BaseException):
    """What stands in for SIGKILL: nothing catches it, and nothing changes a file after it."""


def kill_at(monkeypatch, count):
    """End the thread that saves at its count-th change of the directory; says whether it came to that."""
    calls = [0]

    def guarded(real):
        def operation(*args, **kwargs):
            if threading.current_thread().name == "checkpoint":
                calls[0] += 1
                if calls[0] >= count:
                    raise Killed
            return real(*args, **kwargs)

        return operation

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    return lambda: calls[0] >= count


# The thread's end by Killed is the test's doing.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_at_every_change_of_a_save_and_a_delete(victims, monkeypatch):
    found = []
    for count in range(1, 100):
        victim = victims()
        with pytest.MonkeyPatch.context() as patch:
            killed = kill_at(patch, count)
            with Checkpoints(victim.directory, keep=1) as checkpoints:
                checkpoints.save(3, state(3))
        restored = victim.restore()
        step = int(restored["step"])
        assert same(restored, state(step)) and victim.events == []
        if not killed():
            break
        found.append(step)
        if count % 4:
            continue
        # And the directory is as usable as before.
        with Checkpoints(victim.directory, keep=2) as checkpoints:
            checkpoints.save(4, state(4))
            checkpoints.wait()
            assert same(checkpoints.restore(state(0)), state(4))
        assert sorted(steps(victim.directory)) == [step, 4]
        assert {path.name for path in victim.directory.iterdir()} == {str(step), "4", ".lock"}
    # Before the rename the old checkpoint is the newest, from then on the new one; each was seen.
    assert found == sorted(found) and set(found) == {2, 3} and len(found) > 10
