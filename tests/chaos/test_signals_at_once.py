"""A signal before the first step or after the last: there is nothing to save, so nobody waits for what is under way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.histories import SETTINGS, text
from vishwamai_eqx import checkpoint

# What takes long is made to take longer, and says when it has begun.
PROGRAM = """
import sys, time
import jax, train
from vishwamai_eqx import evaluation
from vishwamai_eqx.tokenizer import VishwamAITokenizer

def wait(*_):
    print("in the midst", flush=True)
    time.sleep(300)

if sys.argv[1] == "tokenizing":
    VishwamAITokenizer.encode_batch = wait
elif sys.argv[1] == "evaluating":
    evaluation.held_out = wait
else:
    jax.stages.Lowered.compile = wait
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("what", "number", "code"),
    [("tokenizing", signal.SIGTERM, 143), ("compiling", signal.SIGINT, 130), ("evaluating", signal.SIGTERM, 143)],
)
def test_it_leaves_at_once(tmp_path, what, number, code):
    arguments = ["--run-dir", str(tmp_path / "run"), "--data", text(tmp_path), "--steps=2", *SETTINGS]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(train.__file__).parent),
        "VISHWAMAI_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-c", PROGRAM, what, *arguments]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "in the midst\n"
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code, errors
    assert f"{number.name}: exiting" in errors and "Traceback" not in errors
    # No run has begun, so the same command with other settings is none that is refused.
    assert what != "tokenizing" or not (tmp_path / "run" / "config.json").exists()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == ([2] if what == "evaluating" else [])
