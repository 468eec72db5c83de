"""`train.py` and steps that go wrong: skipped, gone back from, given up; and steps done again by `--replay`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from tests.histories import SETTINGS, events, numbers, stored, text
from vishwamai_eqx import policy
from vishwamai_eqx.feed import Feed, place

# The mark of a poisoned batch; positions this large change nothing else.
MARK = 10**6


def poison(batch):
    positions = jax.device_put(batch.positions.at[0, -1, -1].set(MARK), batch.positions.sharding)
    return batch._replace(positions=positions)


@pytest.fixture
def poisoned(monkeypatch):
    """A function that says on which steps' batches the one device that has the marked row computes NaN, or what is
    so many times too large."""
    bad: set[int] = set()
    times = np.nan
    right = train.token_loss

    def token_loss(model, specs, hidden, batch):
        factor = jnp.where((batch.positions >= MARK).any(), times, 1.0)
        return right(model, specs, hidden * factor, batch)

    def feed(dataset, steps, *arguments, **settings):
        for n, batch in zip(steps, Feed(dataset, steps, *arguments, **settings), strict=True):
            yield poison(batch) if n + 1 in bad else batch

    class Poisoned:
        waited = 0.0

        def __init__(self, *arguments, **settings):
            self.batches = feed(*arguments, **settings)

        def __iter__(self):
            return self.batches

    monkeypatch.setattr(train, "token_loss", token_loss)
    monkeypatch.setattr(train, "Feed", Poisoned)
    monkeypatch.setattr(
        policy, "place", lambda dataset, n, *rest: poison(b) if (b := place(dataset, n, *rest)) and n + 1 in bad else b
    )

    def say(steps, factor=np.nan):
        nonlocal times
        times = factor
        bad.update(steps)

    return say


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return text(tmp_path_factory.mktemp("text"))


def run(run_dir, corpus, *more):
    own = [
        "--steps",
        "24",
        "--optim.batch-size",
        "8",
        "--checkpoint.every",
        "5",
        "--guard.patience",
        "3",
        "--mesh",
        "data=8",
    ]
    return train.main(["--run-dir", str(run_dir), "--data", corpus, *own, *SETTINGS, *more])


def test_back_to_a_checkpoint_and_past_the_batches_and_then_replayed(tmp_path, corpus, poisoned, capsys):
    poisoned({3, 12, 13, 14})
    assert run(tmp_path, corpus) == 0
    rows, _ = numbers(tmp_path)
    hashes = {row[0]: row[5] for row in rows}
    skipped = [(step, message) for kind, step, message in events(tmp_path) if kind == "skipped"]
    assert [step for step, _ in skipped] == [3, 12, 13, 14]
    # Which row is poisoned does not matter to the hidden states, only to what is made of them.
    assert "skipped, 1 in a row: the loss was the first that was not finite; loss nan" in skipped[0][1]
    assert f"batch {hashes[3]}" in skipped[0][1]
    assert "skipped, 3 in a row" in skipped[3][1]
    # Step 15 was under way when 14 was looked at.
    ((_, step, message),) = [event for event in events(tmp_path) if event[0] == "went_back"]
    assert (step, message) == (15, "to the state of step 10, and on with the batch after step 15")
    assert list(hashes) == [*range(1, 11), *range(16, 25)]
    assert all(jnp.isfinite(array).all() for array in stored(tmp_path, 20).values())

    for step in (3, 17):
        assert run(tmp_path, corpus, "--replay", str(step)) == 0
        said = capsys.readouterr().out
        assert said.count("agrees bit for bit") == 3
        assert ("the step is skipped: the loss was the first" in said) == (step == 3)
    assert "done again from step 15 on 8 cpu" in said
    assert run(tmp_path, corpus, "--replay", "14") == 2
    assert f"replay=14 must be a step that the logbook of {tmp_path} has; take 16." in capsys.readouterr().err
    comes_out_otherwise(tmp_path, corpus, capsys)


def comes_out_otherwise(run_dir, corpus, capsys):
    """A step whose logged loss is another than the one that is computed again."""
    (segment,) = [path for path in (run_dir / "metrics").glob("attempt-*") if '"step": 9, "loss": ' in path.read_text()]
    lines = segment.read_text()
    changed = re.sub(r'("step": 9, "loss": )\d', r"\g<1>1", lines, count=1)
    assert changed != lines
    segment.write_text(changed)
    assert run(run_dir, corpus, "--replay", "9") == 1
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"loss: [\d.]+ was [\d.]+", said[-3])
    assert [line.endswith("agrees bit for bit") for line in said[-2:]] == [True, True]


def test_a_spike_is_skipped_by_the_default_limits(tmp_path, corpus, poisoned, capsys):
    poisoned({56}, 1000.0)
    assert run(tmp_path, corpus, "--steps", "58") == 0
    ((_, step, message),) = [event for event in events(tmp_path) if event[0] == "skipped"]
    assert step == 56 and "skipped, 1 in a row: a spike; loss" in message
    losses = {row[0]: row[1] for row in numbers(tmp_path)[0]}
    assert losses[56] > 3 * losses[55] and losses[58] < 1.1 * losses[55]


def test_gives_up_with_a_report(tmp_path, corpus, poisoned, capsys):
    poisoned(set(range(12, 25)))
    assert run(tmp_path, corpus) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "stopped: 3 steps in a row were skipped, again after going back" in said
    assert [step for kind, step, _ in events(tmp_path) if kind == "skipped"] == [12, 13, 14, 16, 17, 18]
    assert "stopped" in [kind for kind, _, _ in events(tmp_path)]
    # The state that it stopped with is as good as that of the checkpoint it went back to.
    ours, theirs = stored(tmp_path, 15), stored(tmp_path, 10)
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == ["step"]


def test_a_fault_in_mid_run_is_no_refusal(tmp_path, corpus, monkeypatch):
    """It leaves with a traceback, and so with exit code 1."""

    def fault(*_):
        raise ValueError("not what a user did")

    monkeypatch.setattr(train.Speed, "__call__", fault)
    with pytest.raises(RuntimeError, match="the run failed: not what a user did"):
        run(tmp_path, corpus)
