"""A run's configuration: the one under a checkpoint's checksum, whatever has become of config.json."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest

import train
from vishwamai_eqx import command_line, saved_config
from vishwamai_eqx.checkpoint import Checkpoints
from vishwamai_eqx.config import PRESETS, from_dict, to_dict

TINY = PRESETS["tiny"]


def optim(**settings):
    return dataclasses.replace(TINY, optim=dataclasses.replace(TINY.optim, **settings))


@pytest.fixture
def run_dir(tmp_path):
    """A run with two checkpoints, in a folder that it has been moved to."""
    config = dataclasses.replace(optim(batch_size=16), run_dir=tmp_path / "before")
    saved_config.make_run_dir(config.run_dir)
    assert saved_config.write(config) == []
    with Checkpoints(config.run_dir / "checkpoints", configuration=to_dict(config)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": jnp.ones(3)})
        checkpoints.wait()
    return config.run_dir.rename(tmp_path / "run")


def parsed(run_dir, *arguments):
    return command_line.parse(["--run-dir", str(run_dir), *arguments])


def change(run_dir, **sections):
    """Other values in config.json."""
    values = json.loads((run_dir / "config.json").read_text())
    for section, settings in sections.items():
        values[section] |= settings
    (run_dir / "config.json").write_text(json.dumps(values))


def test_the_checkpoint_decides_and_says_what_was_wrong(run_dir):
    change(run_dir, optim={"batch_size": 32}, model={"num_layers": 5}, eval={"every": 7})
    config = parsed(run_dir)
    assert (config.optim, config.model, config.run_dir) == (optim(batch_size=16).optim, TINY.model, run_dir)
    # What may differ is nobody's mistake.
    assert config.eval.every == 7 and parsed(run_dir, "--eval.every", "9").eval.every == 9
    there = run_dir / "config.json"
    assert saved_config.write(config) == [
        f"{there} has model.num_layers=5; the run was saved with 4 and goes on with it",
        f"{there} has optim.batch_size=32; the run was saved with 16 and goes on with it",
        f"what {there} was is now config.json.damaged",
    ]
    assert from_dict(json.loads(there.read_text())) == config
    assert saved_config.write(config) == []


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[" * 100_000, b"null", b'{"model": {}}'])
def test_without_a_readable_file_it_is_made_again(run_dir, content):
    path = run_dir / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    config = parsed(run_dir)
    assert config == dataclasses.replace(optim(batch_size=16), run_dir=run_dir)
    first, *rest = saved_config.write(config)
    assert first.startswith(str(path)) and first.endswith("it is made again from the newest checkpoint")
    assert len(rest) == (content is not None) == (run_dir / "config.json.damaged").exists()
    assert from_dict(json.loads(path.read_text())) == config


def test_a_damaged_manifest_leaves_it_to_the_one_before(run_dir):
    (run_dir / "checkpoints" / "2" / "manifest.json").write_text("{")
    change(run_dir, optim={"batch_size": 32})
    assert parsed(run_dir).optim.batch_size == 16


def test_without_any_it_is_refused(run_dir, capsys):
    (run_dir / "config.json").unlink()
    for step in ("1", "2"):
        (run_dir / "checkpoints" / step / "manifest.json").unlink()
    assert train.main(["--run-dir", str(run_dir)]) == 2
    assert f"{run_dir} has checkpoints and no configuration: config.json is lost" in capsys.readouterr().err
    shutil.rmtree(run_dir / "checkpoints")
    assert parsed(run_dir).optim == TINY.optim


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", configuration={"model": {"layers": 3}}) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"checkpoints/1/manifest.json: not a configuration of this version.*another"):
        parsed(tmp_path)
