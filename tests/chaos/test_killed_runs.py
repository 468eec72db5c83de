"""`train.py` killed again and again, at any moment: the run that is left is the run that nobody killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_twelve_kills(tmp_path):
    """A short form of the study, which also plants two wrong numbers and fails if it does not see them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    study = [sys.executable, "-m", "tests.studies.kills", "--kills", "12", "--seed", "2"]
    command = [*study, "--directory", tmp_path / "runs"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    assert found["kills"] >= 12 and found["wrong"] == []
    # More than one way to end, and some in the midst of something.
    assert len(found["by_kind"]) >= 3 and set(found["left_behind"]) - {"nothing"}
