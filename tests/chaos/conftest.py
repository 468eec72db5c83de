"""Good checkpoints, made once and copied for each test that breaks them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.victim import Victim, state
from vishwamai_eqx.checkpoint import Checkpoints


@pytest.fixture(scope="session")
def two_checkpoints(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("chaos") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step))
        checkpoints.wait()
        # A lock that is copied would be nobody's.
        (directory / ".lock").unlink()
    return directory


@pytest.fixture
def victims(two_checkpoints, tmp_path) -> Callable[[], Victim]:
    """A function that gives a new victim at each call."""

    def make() -> Victim:
        return Victim(shutil.copytree(two_checkpoints, tmp_path / str(len(list(tmp_path.iterdir())))), [])

    return make
