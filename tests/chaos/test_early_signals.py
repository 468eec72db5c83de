"""A signal before the first step: there is nothing to save, and nobody waits for what is under way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.histories import SETTINGS, text

# What takes long is made to take longer, and says when it has begun.
PROGRAM = """
import sys, time
import jax, train
from vishwamai_eqx.tokenizer import VishwamAITokenizer

def wait(*_):
    print("in the midst", flush=True)
    time.sleep(300)

if sys.argv[1] == "tokenizing":
    VishwamAITokenizer.encode_batch = wait
else:
    jax.stages.Lowered.compile = wait
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("what", "number", "code"), [("tokenizing", signal.SIGTERM, 143), ("compiling", signal.SIGINT, 130)]
)
def test_it_leaves_at_once(tmp_path, what, number, code):
    arguments = ["--run-dir", str(tmp_path / "run"), "--data", text(tmp_path), *SETTINGS]
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
    assert what == "compiling" or not (tmp_path / "run" / "config.json").exists()
