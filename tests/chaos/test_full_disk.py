"""A disk that really fills up, in a mount of the test's own."""

import subprocess
import sys

import pytest

PROGRAM = """
import subprocess, sys
disk = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", disk], check=True)
import jax, jax.numpy as jnp
from vishwamai_eqx.checkpoint import Checkpoints
from vishwamai_eqx.logbook import Logbook, connect

arrays = {"w": jax.random.normal(jax.random.key(0), (1 << 18,)), "step": jnp.int32(1)}
with Logbook(disk + "/run", 0) as log, Checkpoints(disk + "/run/checkpoints", on_event=log.event) as checkpoints:
    checkpoints.save(1, arrays)
    checkpoints.wait()
    filler = open(disk + "/filler", "wb", buffering=0)
    try:
        while True:
            filler.write(bytes(1 << 12))
    except OSError:
        pass
    checkpoints.save(2, arrays)
    try:
        checkpoints.wait()
        sys.exit("saved on a full disk")
    except RuntimeError as error:
        print(error)
    for step in range(1, 200):
        log.step(step=step, loss=1.0)
    log.flush()
    assert jnp.array_equal(checkpoints.restore(arrays)["w"], arrays["w"]) and checkpoints.latest_step() == 1
    filler.close()
    subprocess.run(["rm", disk + "/filler"])
    checkpoints.save(3, arrays)
    checkpoints.wait()
    log.step(step=200, loss=1.0)
    log.flush()
with connect(disk + "/run") as connection:
    assert connection.execute("SELECT count(*), max(step) FROM steps").fetchall() == [(200, 200)]
    assert connection.execute("SELECT kind, step FROM events").fetchall() == [
        ("checkpoint", 1), ("checkpoint_failed", 2), ("checkpoint", 3)
    ]
"""


def test_the_run_goes_on_and_says_so(tmp_path):
    """Needs a mount name space, which some containers refuse; a limit on the file's size is tried everywhere."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*alone, "mount", "-t", "tmpfs", "none", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount name space here")
    run = subprocess.run([*alone, sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    assert "was not saved" in run.stdout and "No space left on device" in run.stdout
