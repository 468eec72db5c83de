"""A run that was killed comes back with the numbers it would have had: to the last bit, or on another mesh to 1e-9."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import train
from tests.histories import SETTINGS, events, numbers, stored, text
from tests.small import MIXED, random_batch, small
from vishwamai_eqx import command_line, data, optim, state
from vishwamai_eqx.checkpoint import Checkpoints, steps
from vishwamai_eqx.mesh import make_mesh
from vishwamai_eqx.tokenizer import VishwamAITokenizer

MESHES = ["data=1", "data=2,expert=2,model=2"]

# SIGKILL from the thread that saves, once step 20 is saved: the loop is anywhere after it, and 40 cannot be.
KILLED = """
import os, signal, sys
import train
from vishwamai_eqx.logbook import Logbook

event = Logbook.event
def event_or_end(self, kind, message, *, step=None):
    if kind == "checkpoint":
        os.kill(os.getpid(), signal.SIGKILL)
    event(self, kind, message, step=step)
Logbook.event = event_or_end
train.main(sys.argv[1:])
"""


def arguments(run_dir: Path, corpus: str, mesh: str) -> list[str]:
    own = ["--steps=40", "--optim.batch-size=8", "--checkpoint.every=20", f"--mesh={mesh}"]
    return ["--run-dir", str(run_dir), "--data", corpus, *own, *SETTINGS]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory, corpus):
    """For each mesh a run under way that is going to be killed: they start together."""
    runs = {}
    for mesh in MESHES:
        run_dir = tmp_path_factory.mktemp("killed") / "run"
        command = [sys.executable, "-c", KILLED, *arguments(run_dir, corpus, mesh)]
        environment = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent)}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        runs[mesh] = (run_dir, process)
    yield runs
    for _, process in runs.values():
        process.wait(500)
        process.stderr.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, killed):
    """A function that gives the run on a mesh that nobody killed."""

    @functools.cache
    def run(mesh: str) -> Path:
        run_dir = tmp_path_factory.mktemp("whole") / "run"
        assert train.main(arguments(run_dir, corpus, mesh)) == 0
        return run_dir

    return run


@pytest.mark.parametrize("mesh", MESHES)
def test_forty_steps_are_twenty_a_kill_and_twenty(mesh, corpus, killed, whole, capsys):
    expected = whole(mesh)
    run_dir, process = killed[mesh]
    _, errors = process.communicate(timeout=500)
    assert process.returncode == -9, errors
    assert steps(run_dir / "checkpoints") == [20]
    assert train.main(arguments(run_dir, corpus, mesh)) == 0

    rows, evals = numbers(run_dir)
    assert [row[0] for row in rows] == list(range(1, 41)) and [row[0] for row in evals] == [20, 40]
    assert len({row[1] for row in rows}) == len({row[5] for row in rows}) == 40
    assert (rows, evals) == numbers(expected)
    ours, theirs = stored(run_dir, 40), stored(expected, 40)
    assert [name for name in theirs if theirs[name].tobytes() != ours[name].tobytes()] == []
    assert {name.split("/")[0] for name in theirs} == {"model", "opt_state", "watch", "step"}


@pytest.fixture
def left(tmp_path, killed):
    """The folder of a run of 40 steps that was killed after step 20."""
    run_dir, process = killed["data=1"]
    process.wait(500)
    copied = tmp_path / "left"
    shutil.copytree(run_dir, copied)
    shutil.rmtree(copied / "checkpoints" / "40", ignore_errors=True)
    return copied


def test_an_offloaded_optimiser_goes_on_with_the_same_numbers(left, corpus, whole, monkeypatch):
    kinds, save = set(), Checkpoints.save

    def seen(self, step, state):
        kinds.update(leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
        save(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", seen)
    assert train.main([*arguments(left, corpus, "data=1"), "--offload"]) == 0
    assert kinds == {"pinned_host"}
    assert numbers(left) == numbers(whole("data=1"))


def test_a_changed_config_json_changes_no_number(left, whole, capsys):
    """Its checkpoints say what a run was started with."""
    settings = (left / "config.json").read_text()
    changed = settings.replace('"learning_rate": 0.004', '"learning_rate": 0.005')
    assert changed != settings
    (left / "config.json").write_text(changed)
    assert train.main(["--run-dir", str(left)]) == 0
    assert numbers(left) == numbers(whole("data=1"))
    said = " ".join(capsys.readouterr().err.split())
    assert "config.json has optim.learning_rate=0.005; the run was saved with 0.004 and goes on with it" in said
    assert [step for kind, step, _ in events(left) if kind == "configuration_damaged"] == [20, 20]
    assert (left / "config.json.damaged").read_text() == changed
    assert command_line.parse(["--run-dir", str(left)]).optim.learning_rate == 0.004


def test_damaged_checkpoints_are_told_and_the_last_one_is_not_retrained(left, corpus, capsys):
    shutil.copytree(left / "checkpoints" / "20", left / "checkpoints" / "30")
    assert train.main(arguments(left, corpus, "data=1")) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "30/manifest.json is that of step 20; it is now 30.damaged and checkpoint 20 is used" in said
    for step in ("20", "40"):
        (left / "checkpoints" / step / "state" / "_METADATA").unlink()
    rows, there = numbers(left), contents(left / "checkpoints")
    assert train.main(arguments(left, corpus, "data=1")) == 2
    assert "no good checkpoint left: 40/state/_METADATA is missing; 20/state/_METADATA" in capsys.readouterr().err
    assert numbers(left) == rows and contents(left / "checkpoints") == there


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_changed_data_is_refused_and_nothing_of_the_run_is_changed(left, corpus, capsys):
    """The settings are the same, and a file is not."""
    victim, there = Path(corpus).parent / "7.txt", contents(left)
    before = victim.read_text()
    victim.write_text(before.replace("a", "b"))
    try:
        assert train.main([*arguments(left, corpus, "data=1"), "--eval.rows=16"]) == 2
    finally:
        victim.write_text(before)
    assert contents(left) == there
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "fingerprint" in line]
    assert "have changed in mid-run; put them back, or take another --run-dir" in sentence


def test_a_run_without_its_config_json_is_a_run(left, corpus, tmp_path, whole, capsys):
    """What starts another one in its place is refused before anything of it, its tokenizer first, is overwritten."""
    (left / "config.json").unlink()
    other, there = tmp_path / "other", contents(left)
    other.mkdir()
    assert train.main(arguments(left, text(other), "data=1")) == 2
    assert "another configuration: data.files=" in capsys.readouterr().err
    assert contents(left) == there
    assert train.main(["--run-dir", str(left)]) == 0
    assert numbers(left) == numbers(whole("data=1"))


def test_an_exchanged_tokenizer_is_refused_before_the_text_is_tokenized_with_it(
    tmp_path, corpus, killed, capsys, monkeypatch
):
    run_dir, process = killed["data=1"]
    process.wait(500)
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    VishwamAITokenizer.train(["other words make other pieces of the same number"] * 9, 283, tmp_path / "other")
    monkeypatch.setattr(train.run, "fits", lambda *_: True)
    shutil.copytree(tmp_path / "other", copied / "tokenizer", dirs_exist_ok=True)
    monkeypatch.setattr(train.data, "prepare", lambda *_, **__: pytest.fail("the text is tokenized"))
    assert train.main(arguments(copied, corpus, "data=1")) == 2
    assert "the run's tokenizer has been exchanged; put its own back" in capsys.readouterr().err


def test_another_mesh_goes_on_with_the_same_batches(tmp_path):
    """In f64, where what is left of the devices' order of summation is far below 1e-9."""
    config = small()

    def run(sizes: dict[str, int], first: int, last: int, checkpoints: Checkpoints) -> list[train.Metrics]:
        mesh, transform = make_mesh(sizes), optim.optimizer(config.optim)
        abstract = state.abstract_state(config, "float64", transform)
        specs = state.placement(abstract, dict(mesh.shape), transform)
        shardings = state.shardings(mesh, specs)
        wide = lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf  # noqa: E731
        new = jax.tree.map(wide, state.initialise(config, "float64", transform, shardings))
        current = new if first == 0 else checkpoints.restore(new)
        step = train.make_step(config, mesh, specs, transform)
        metrics = []
        for n in range(first, last):
            batch = jax.tree.map(lambda rows: rows[None], random_batch(16, 16, n))
            current, more = step(current, jax.device_put(batch, NamedSharding(mesh, train.MICROBATCHES)))
            metrics.append(jax.device_get(more))
        checkpoints.save(last, current)
        return metrics

    with jax.enable_x64(True), Checkpoints(tmp_path / "a") as whole, Checkpoints(tmp_path / "b") as resumed:
        expected = run({"data": 8}, 0, 12, whole)
        found = run(MIXED, 0, 6, resumed) + run({"data": 4, "expert": 2}, 6, 12, resumed)
    hashes = [str(data.BatchHash(one.batch)) for one in found]
    assert hashes == [data.batch_hash(random_batch(16, 16, n)) for n in range(12)]
    losses, others = ([one.loss for one in metrics] for metrics in (found, expected))
    assert losses[0].dtype == np.float64
    assert np.max(np.abs(np.subtract(losses, others))) < 1e-9
    # And these are other meshes: hardly a step was computed as on the first.
    numbers = [[np.asarray(leaf).tolist() for leaf in jax.tree.leaves(metrics)] for metrics in (found, expected)]
    half = len(numbers[0]) // 2
    assert numbers[0][:half] != numbers[1][:half] and numbers[0][half:] != numbers[1][half:]
