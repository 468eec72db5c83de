"""What several processes tell each other before they are one run; tests/test_processes.py starts real ones."""

import jax
import pytest

from vishwamai_eqx import processes
from vishwamai_eqx.config import ProcessesConfig


@pytest.mark.parametrize(
    ("settings", "sentences"),
    [
        ({}, []),
        ({"address": "auto"}, []),
        ({"address": "127.0.0.1:8476", "count": 2, "index": 1}, []),
        ({"count": 2}, ["processes.count=2 means nothing without processes.address; give it HOST:PORT, or auto."]),
        (
            {"address": "auto", "index": 0},
            ["processes.index=0 means nothing with processes.address=auto, which finds it; leave it out."],
        ),
        (
            {"address": "localhost", "count": 2},
            [
                "processes.address='localhost' must be HOST:PORT, where process 0 listens, or auto on a TPU pod or "
                "under Slurm; take 127.0.0.1:8476 for processes of one machine.",
                "processes.index must be given with processes.address='localhost': which of them this is, from 0.",
            ],
        ),
        (
            {"address": "[::1]:99999", "count": 0, "index": 0},
            [
                "processes.address='[::1]:99999' must be HOST:PORT, where process 0 listens, or auto on a TPU pod or "
                "under Slurm; take 127.0.0.1:8476 for processes of one machine.",
                "processes.count=0 must be at least 1; take 2.",
            ],
        ),
        (
            {"address": "a:1", "count": 2, "index": 2},
            ["processes.index=2 must be at least 0 and below processes.count=2; take 0 for the first."],
        ),
    ],
    ids=str,
)
def test_settings_with_which_no_processes_find_each_other(settings, sentences):
    assert processes.problems(ProcessesConfig(**settings)) == sentences


@pytest.fixture
def second_of_two(monkeypatch):
    """As process 1 of two, to whom process 0 says what the test says."""
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_tell", lambda text: [said.pop(0), text])
    return said


def test_a_refusal_in_one_is_one_in_all(second_of_two):
    second_of_two += ["", "its sentence", "", "mine"]
    with processes.together():
        pass
    with pytest.raises(ValueError, match="process 0: its sentence"), processes.together():
        pass
    with pytest.raises(ValueError, match="mine"), processes.together():
        raise ValueError("mine")
    with pytest.raises(ValueError, match="mine"), processes.together():
        raise ValueError("mine")


def test_what_cannot_be_read_or_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: No such file or directory; mend that"), processes.together():
        (tmp_path / "nowhere").open()
    with pytest.raises(ValueError, match=r"reads and writes .*: No space left on device; mend"), processes.together():
        raise OSError(28, "No space left on device")


def test_processes_that_are_not_alike_are_told_in_what(second_of_two):
    second_of_two += ['{"seed": 0, "model": {"num_layers": 2, "window": 5}}'] * 2
    processes.require_same({"seed": 0, "model": {"num_layers": 2, "window": 5}})
    with pytest.raises(ValueError) as refusal:
        processes.require_same({"seed": 1, "model": {"num_layers": 3, "window": 5}})
    assert str(refusal.value).splitlines() == [
        "seed=1 of process 1 must be 0, as process 0 has it; start all alike.",
        "model.num_layers=3 of process 1 must be 2, as process 0 has it; start all alike.",
    ]


def test_of_a_process_that_is_alone_errors_go_where_they_always_do():
    with pytest.raises(ValueError, match="alone"), processes.bounded():
        raise ValueError("alone")
    with pytest.raises(ValueError, match="alone"), processes.together():
        raise ValueError("alone")
    with processes.together():
        processes.require_same({"seed": 3})
