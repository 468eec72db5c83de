"""Two processes of four devices each: each writes, checks and reads its part, and one answer holds for both."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from vishwamai_eqx import manifest

PROGRAM = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
rank, port, directory, steps = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
import contextlib, jax, numpy as np, time
from vishwamai_eqx.guard import Signals

signals, running = Signals(2), contextlib.ExitStack()
begin = [lambda: jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank), lambda: running.enter_context(signals)]
# The last to set a handler has the signal: our flag, or jax, which takes SIGTERM for the notice of a pod's scheduler.
for each in begin[::-1] if sys.argv[5] == "notice" else begin:
    each()
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from vishwamai_eqx.checkpoint import Checkpoints

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

def state(seed):
    def placed(array, *spec):
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P(*spec)), lambda index: array[index])

    weight = np.random.default_rng(seed).normal(size=(64, 32)).astype(np.float32)
    return {"w": placed(weight, "data"), "m": placed(weight * 2, None, "data"), "step": placed(np.int32(seed))}

def say(*words):
    # Not on standard output, where the collectives' library writes, in pieces, from threads of its own.
    print("said", *words, file=sys.stderr, flush=True)

def event(kind, message, *, step=None):
    say(kind, step, message)

with running, Checkpoints(directory, keep=2, every=2, on_event=event) as checkpoints:
    restored, first = checkpoints.restore(state(0)), 0
    if restored is not None:
        first = int(restored["step"].addressable_shards[0].data)
        for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state(first)), strict=True):
            for one, other in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
                assert np.array_equal(one.data, other.data)
    say("restored", first)
    for step in range(first + 1, first + steps + 1):
        time.sleep(0.01)
        stop = signals.stop(step)
        if stop or checkpoints.due(step):
            checkpoints.save(step, state(step))
        if stop:
            checkpoints.wait()
            say("stopped", step)
            sys.exit(signals.exit_code)
"""


def both(directory, steps, stopped_by="signal"):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(port), directory, str(steps), stopped_by],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        for rank in (0, 1)
    ]


def said(runs, code=0):
    out = []
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == code, errors
        out.append([line.removeprefix("said ") for line in errors.splitlines() if line.startswith("said ")])
    return out


@pytest.mark.slow
def test_each_does_its_part(tmp_path):
    directory = tmp_path / "checkpoints"
    first, second = said(both(directory, 4))
    assert first[0] == second[0] == "restored 0"
    assert [line.split()[:2] for line in first[1:]] == [["checkpoint", "2"], ["checkpoint", "4"]]
    assert {path.name for path in directory.iterdir()} == {"2", "4", ".lock"}
    # Into how many files a process puts its part depends on how long its writes took.
    assert any("process_1" in name for name in manifest.read(directory / "4")["files"])

    # A file at an even place of the list is checked by process 0, one at an odd place by process 1.
    names = manifest.files(directory / "4")
    for index in (0, 1):
        path = directory / str(4) / names[index + 2]
        path.write_bytes(os.urandom(path.stat().st_size))
        first, second = said(both(directory, 2))
        assert f"4/{names[index + 2]} has checksum" in first[0]
        assert first[1] == second[0] == "restored 2"
        assert first[2].startswith("checkpoint 4")
        names = manifest.files(directory / "4")


@pytest.mark.slow
@pytest.mark.parametrize("stopped_by", ["signal", "notice"])
def test_one_that_is_told_to_stop_stops_both_at_one_step(tmp_path, stopped_by):
    runs = both(tmp_path / "checkpoints", 100_000, stopped_by)
    for run in runs:
        while not run.stderr.readline().startswith("said restored"):
            pass
    runs[1].send_signal(signal.SIGTERM)
    first, second = said(runs, code=143)
    stopped = [line for line in first + second if line.startswith("stopped")]
    assert len(stopped) == 2 and stopped[0] == stopped[1]
    step = int(stopped[0].split()[1])
    # Signals are compared at every eighth step; of a notice jax says at which step to stop.
    assert step % 8 == 0 or stopped_by == "notice"
    assert (tmp_path / "checkpoints" / str(step) / "manifest.json").exists()
