"""Two processes of four devices are one run: with the numbers of one process, and with an end when one of them ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from tests.histories import SETTINGS, numbers, stored, text
from tests.small import MIXED, small
from tests.test_train import OTHERWISE, WEIGHTS, run, to_one_expert

# jax gives a process that it does not hear of 100 s; here the tests would wait for that.
PROGRAM = """
import sys, train, functools, jax
jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=10)
sys.exit(train.main(sys.argv[1:]))
"""

# Both processes do the same steps in f64; what they say of them the first one leaves behind.
STEPS = """
import sys, jax
address, index, path = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
import numpy as np
from tests.small import MIXED
from tests.test_processes import MESHES
from tests.test_train import OTHERWISE, WEIGHTS, run_on_devices, small, to_one_expert
found = {}
with jax.enable_x64(True):
    for name, (mesh, microbatches, model) in MESHES.items():
        start = to_one_expert if name == "one expert" else lambda s: s
        config = small(optim={**WEIGHTS, "microbatches": microbatches}, **model)
        metrics, _ = run_on_devices(config, mesh, 6, "float64", start)
        found[name] = np.array([float(it.loss) for it in metrics])
if jax.process_index() == 0:
    np.savez(path, **found)
"""
# Axes that cross the processes, and all the rest: remat, untied embeddings, dropout, accumulation.
MESHES = {
    "data": ({"data": 8}, 1, OTHERWISE),
    "mixed": (MIXED, 2, OTHERWISE),
    "one expert": (MIXED, 1, {"experts_per_token": 1}),
}

# Ours where a collective fails at once, jax's where it hangs.
LOST = re.compile("another of its processes was lost|another task died")


def arguments(run_dir: Path, corpus: str, *more: str) -> list[str]:
    own = ["--steps=40", "--optim.batch-size=8", "--optim.microbatches=2", "--checkpoint.every=8"]
    return ["--run-dir", str(run_dir), "--data", corpus, "--mesh=data=2,expert=2,model=2", *own, *SETTINGS, *more]


def two(run_dir: Path, corpus: str, *more: str, second: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    """Both processes, started; `second` is for the second alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = (f"--processes.address=127.0.0.1:{free.getsockname()[1]}", "--processes.count=2")
    return [
        started("-c", PROGRAM, *arguments(run_dir, corpus, *more), *(second * index), *where, own)
        for index, own in enumerate(["--processes.index=0", "--processes.index=1"])
    ]


def started(*command: str) -> subprocess.Popen:
    """A process of four devices, compiling as this one does: other programs draw other last bits."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=Path(train.__file__).parent,
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Of each process its exit code, what it printed and what it said; none outlives the test."""
    try:
        printed = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(processes, printed, strict=True)]


def wait_for(path: Path, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.005)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return text(tmp_path_factory.mktemp("text"))


@pytest.mark.slow
def test_lost_stopped_and_ended_by_one_process_it_has_the_numbers_of_one_process(tmp_path, corpus, capfd):
    run_dir, alone = tmp_path / "two", tmp_path / "one"

    processes = two(run_dir, corpus)
    wait_for(run_dir / "checkpoints" / "8", processes)
    processes[1].kill()
    (code, _, errors), _ = ended(processes)
    assert code not in (0, 2)
    assert LOST.search(errors), errors

    processes = two(run_dir, corpus)
    wait_for(run_dir / "checkpoints" / "24", processes)
    processes[1].send_signal(signal.SIGTERM)
    first, second = ended(processes)
    assert (first[0], second[0]) == (143, 143), first[2] + second[2]
    # Only one of them speaks.
    assert "step 32 is saved" in first[2] or "step 40 is saved" in first[2]
    assert second[1] == "" and "is saved" not in second[2]

    capfd.readouterr()
    assert train.main(arguments(run_dir, corpus, "--mesh=data=4")) == 0
    assert train.main(arguments(alone, corpus)) == 0
    (steps, evals), (steps_alone, evals_alone) = numbers(run_dir), numbers(alone)
    hashes, hashes_alone = ([row[-1] for row in rows] for rows in (steps, steps_alone))
    assert len(hashes) == 40 and hashes == hashes_alone
    np.testing.assert_allclose(*([row[:-1] for row in rows] for rows in (steps, steps_alone)), rtol=2e-5)
    np.testing.assert_allclose(evals, evals_alone, rtol=2e-5)
    ours, theirs = stored(run_dir, 40), stored(alone, 40)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_steps_of_two_processes_have_the_losses_of_one_device(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    path = tmp_path / "losses.npz"
    processes = [started("-c", STEPS, address, str(index), str(path)) for index in range(2)]
    (first, *_), (second, *_) = said = ended(processes)
    assert (first, second) == (0, 0), said
    with np.load(path) as found, jax.enable_x64(True):
        assert found.keys() == MESHES.keys()
        for name, (_, _, model) in MESHES.items():
            start = to_one_expert if name == "one expert" else lambda s: s
            expected, _ = run(small(optim=WEIGHTS, **model), {}, 6, "float64", start)
            np.testing.assert_allclose(found[name], [float(it.loss) for it in expected], rtol=1e-9, err_msg=name)


@pytest.mark.slow
def test_without_the_first_process_the_second_ends_too(tmp_path, corpus):
    processes = two(tmp_path / "run", corpus)
    wait_for(tmp_path / "run" / "checkpoints" / "8", processes)
    processes[0].kill()
    _, (code, _, errors) = ended(processes)
    assert code not in (0, 2)
    assert LOST.search(errors), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "both", "second", "sentence"),
    [
        (None, (), ("--seed=1",), "seed=1 of process 1 must be 0, as process 0 has it; start all alike."),
        ("nothing/*.txt", (), (), "data.files='nothing/*.txt': no file matches"),
        (None, ("--mesh=data=4",), (), "mesh='data=4' must be of all 8 devices of the 2 processes; take data=8."),
    ],
)
def test_what_one_refuses_all_refuse(tmp_path, corpus, files, both, second, sentence):
    first, other = ended(two(tmp_path / "run", files or corpus, *both, second=second))
    assert (first[0], other[0]) == (2, 2), first[2] + other[2]
    for _, _, errors in (first, other):
        assert sentence in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "run" / "config.json").exists()
