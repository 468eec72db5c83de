"""`train.py` killed again and again, at any moment: the run that is left is the run that nobody killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.histories import SETTINGS, events, numbers, stored, text

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
OWN = f"--steps {STEPS} --optim.batch-size 4 --checkpoint.every 3 --checkpoint.keep 2 --model.num-layers 1".split()


def start(run_dir, corpus, out):
    command = [sys.executable, ROOT / "train.py", "--run-dir", run_dir, "--data", corpus, *SETTINGS, *OWN]
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment)


def rows(run_dir):
    """Lines that this attempt and all before it have written."""
    return sum(path.read_bytes().count(b"\n") for path in (run_dir / "metrics").glob("attempt-*"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    with open(run_dir.with_suffix(".log"), "w+") as out:
        assert start(run_dir, corpus, out).wait(300) == 0, Path(out.name).read_text()
    return run_dir


def kill_and_resume(run_dir, undisturbed, corpus, kills, seed):
    chance = random.Random(seed)
    with open(run_dir.with_suffix(".log"), "w+") as out:
        for kill in range(kills):
            before = rows(run_dir)
            run = start(run_dir, corpus, out)
            # After so many rows, and then a moment more: in a step, a save, a delete, a row, an evaluation.
            until = before + chance.choice([1, 3, chance.randint(4, 12), chance.randint(4, 30)])
            while run.poll() is None and rows(run_dir) < until:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.08))
            if run.poll() is not None:
                # It was quicker than the kill: this history is done, and it must be right.
                assert run.returncode == 0, Path(out.name).read_text()
                break
            run.send_signal(chance.choice([signal.SIGKILL] * 3 + [signal.SIGTERM]))
            assert run.wait(60) in (-signal.SIGKILL, 143), f"kill {kill} of seed {seed}: {Path(out.name).read_text()}"
        assert start(run_dir, corpus, out).wait(300) == 0, f"seed {seed}: {Path(out.name).read_text()}"
    assert numbers(run_dir) == numbers(undisturbed)
    # No kill looks like damage.
    assert "checkpoint_damaged" not in {kind for kind, _, _ in events(run_dir)}
    ours, theirs = stored(run_dir, STEPS), stored(undisturbed, STEPS)
    assert [name for name in theirs if not np.array_equal(ours[name], theirs[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_six_kills(tmp_path, undisturbed, corpus, seed):
    kill_and_resume(tmp_path / "run", undisturbed, corpus, kills=6, seed=seed)


@pytest.mark.slow
def test_a_wrong_number_would_be_seen(tmp_path, undisturbed):
    """The test of these tests: the two histories are compared, to the last bit."""
    found, evals = numbers(undisturbed)
    assert [row[0] for row in found] == list(range(1, STEPS + 1))
    assert len({row[5] for row in found}) == STEPS and len(evals) == STEPS // 20
    changed = [(*row[:1], row[1] * (1 + 1e-15), *row[2:]) for row in found]
    assert changed != found
