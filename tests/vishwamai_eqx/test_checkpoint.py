"""Checkpoints: what was saved comes back exactly, on any mesh, or the run is told why not."""

import json
import os
import pickle
import resource
import shutil
import threading
import time
import zlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vishwamai_eqx import checkpoint, manifest
from vishwamai_eqx.checkpoint import Checkpoints, check_origin, read, steps


class Model(eqx.Module):
    weight: jax.Array
    bias: jax.Array
    scale: jax.Array
    activation: object
    width: int = eqx.field(static=True)


class TrainState(eqx.Module):
    model: Model
    opt_state: tuple
    key: jax.Array
    step: jax.Array


def mesh(*sizes):
    return jax.make_mesh(sizes, ("data", "expert", "model")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def placed(array, on, *spec):
    return jax.device_put(array, NamedSharding(on, P(*spec)))


def state(seed, on=None):
    """Every kind of leaf: sharded and not, of small types, a scalar, a typed key, a function, a static field."""
    on = on or mesh(8)
    weight = jax.random.normal(jax.random.key(seed), (16, 24))
    model = Model(
        weight=placed(weight, on, "data"),
        bias=placed(jnp.arange(24, dtype=jnp.bfloat16) + seed, on),
        scale=placed(jnp.full((8,), 0.5 * seed, jnp.float8_e4m3fn), on),
        activation=jax.nn.silu,
        width=24,
    )
    moments = {"mu": placed(weight * 2, on, "data"), "nu": placed(weight**2, on, "data")}
    return TrainState(model, ((), moments), jax.random.key(seed), placed(jnp.int32(seed), on))


def abstract(like, on=None):
    def leaf(x):
        if not eqx.is_array(x):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if on is None else NamedSharding(on, P()))

    return jax.tree.map(leaf, like)


def bits(tree):
    return [
        np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf).tobytes()
        for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    ]


@pytest.fixture
def events():
    return []


@pytest.fixture
def opened(tmp_path, events):
    """A function that opens the directory as a new process would, and says what happened in `events`."""

    def make(**settings):
        return Checkpoints(
            tmp_path / "checkpoints",
            on_event=lambda kind, message, step: events.append((kind, step, message)),
            **settings,
        )

    return make


def test_nothing_saved_is_nothing_restored(opened):
    with opened() as checkpoints:
        assert checkpoints.restore(state(0)) is None
        assert checkpoints.latest_step() is None


def test_what_was_saved_comes_back_exactly(opened, events):
    saved = state(3)
    with opened() as checkpoints:
        checkpoints.save(3, saved)
    with opened() as checkpoints:
        restored = checkpoints.restore(abstract(saved))
    assert bits(restored) == bits(saved)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for ours, theirs in zip(*(jax.tree.leaves(eqx.filter(t, eqx.is_array)) for t in (restored, saved)), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    assert [event[:2] for event in events] == [("checkpoint", 3)]


@pytest.mark.parametrize("sizes", [(1,), (4, 2), (2, 2, 2)])
def test_another_mesh_reads_it(opened, sizes):
    saved = state(1)
    with opened() as checkpoints:
        checkpoints.save(1, saved)
        other = abstract(state(0, mesh(*sizes)))
        restored = checkpoints.restore(other)
    assert bits(restored) == bits(saved)
    assert restored.model.weight.sharding == other.model.weight.sharding


def test_pickle_is_never_asked(opened, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    with opened() as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.wait()
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(pickle, name, refuse)
        assert bits(checkpoints.restore(abstract(state(0)))) == bits(state(1))


def test_the_state_may_be_donated_while_it_is_written(opened, monkeypatch):
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    arrays = {f"w{i}": placed(jnp.full((512, 512), float(i)), mesh(8), "data") for i in range(8)}
    arrays = update(arrays)
    expected = bits(arrays)
    with opened() as checkpoints:
        checkpoints.save(1, arrays)
        for _ in range(5):
            arrays = update(arrays)
        assert bits(checkpoints.restore(abstract(arrays))) == expected


def test_a_save_goes_on_beside_the_loop(opened, monkeypatch):
    """What takes long, reading every file again for its checksum, is none of the loop's time."""
    gate, real = threading.Event(), manifest.checksums
    monkeypatch.setattr(manifest, "checksums", lambda *args: gate.wait(30) and real(*args))
    with opened() as checkpoints:
        checkpoints.save(1, state(1))
        assert checkpoints.latest_step() is None
        gate.set()
        checkpoints.wait()
        assert checkpoints.latest_step() == 1


def test_a_checkpoint_says_what_it_is(opened, tmp_path):
    with opened(configuration={"model": {"hidden_size": 24}}) as checkpoints:
        checkpoints.save(7, state(7))
    about = manifest.read(tmp_path / "checkpoints" / "7")
    assert about["configuration"] == {"model": {"hidden_size": 24}}
    assert about["code"].keys() >= {"vishwamai_eqx", "jax", "orbax"}
    leaves = {leaf["path"]: (leaf["shape"], leaf["dtype"]) for leaf in about["leaves"]}
    assert leaves["model/weight"] == ([16, 24], "float32")
    assert leaves["model/scale"] == ([8], "float8_e4m3fn")
    assert leaves["opt_state/1/mu"] == ([16, 24], "float32")
    assert about["step"] == 7 and "state/manifest.ocdbt" in about["files"]


@pytest.mark.parametrize(
    ("where", "leaf", "sentence"),
    [
        (lambda s: s.model.weight, jax.ShapeDtypeStruct((16, 32), jnp.float32), "float32[16, 24] in the checkpoint"),
        (
            lambda s: s.model.bias,
            jax.ShapeDtypeStruct((24,), jnp.float32),
            "model/bias is bfloat16[24] in the checkpoint",
        ),
        (lambda s: s.opt_state[1]["nu"], None, "opt_state/1/nu is float32[16, 24] in the checkpoint and absent here"),
        (lambda s: s.opt_state[0], jax.ShapeDtypeStruct((), jnp.int32), "opt_state/0 is absent in the checkpoint"),
    ],
)
def test_other_leaves_are_refused(opened, where, leaf, sentence):
    with opened() as checkpoints:
        checkpoints.save(1, state(1))
        wanted = eqx.tree_at(where, abstract(state(0)), leaf, is_leaf=lambda x: x == ())
        with pytest.raises(ValueError) as error:
            checkpoints.restore(wanted)
        assert sentence in str(error.value)
        assert "or another run directory" in str(error.value)
        # A setting is at fault and not the checkpoint.
        assert checkpoints.latest_step() == 1


@pytest.mark.parametrize(
    ("name", "fix"),
    [("data", "weights have changed .*; put them back"), ("tokenizer", "put its own back")],
)
def test_what_it_did_not_learn_from_is_refused(opened, tmp_path, name, fix):
    with opened(fingerprints={name: "0123"}) as checkpoints:
        checkpoints.save(1, state(1))
        assert int(checkpoints.restore(abstract(state(0))).step) == 1
    changed = rf"learned from the {name} with fingerprint='0123' and the {name} here has '4567': .*{fix}, or take"
    with opened(fingerprints={name: "4567"}) as checkpoints, pytest.raises(ValueError, match=changed):
        checkpoints.restore(abstract(state(0)))
    assert int(read(tmp_path / "checkpoints", abstract(state(0)), fingerprints={name: "0123"}).step) == 1
    with pytest.raises(ValueError, match=changed):
        read(tmp_path / "checkpoints", abstract(state(0)), fingerprints={name: "4567"})
    # And without reading the state; which checkpoint is a good one is another question.
    check_origin(tmp_path / "nowhere", {name: "4567"})
    check_origin(tmp_path / "checkpoints", {name: "0123"})
    with pytest.raises(ValueError, match=changed):
        check_origin(tmp_path / "checkpoints", {name: "4567"})
    (tmp_path / "checkpoints" / "1" / "manifest.json").write_text("{}")
    check_origin(tmp_path / "checkpoints", {name: "4567"})


@pytest.mark.parametrize("leaf", [1, 2.5, np.ones(3)])
def test_what_would_not_be_saved_is_refused(opened, leaf):
    with opened() as checkpoints, pytest.raises(ValueError, match=r"a/0=.* must be a jax array"):
        checkpoints.save(1, {"a": [leaf]})


def test_the_newest_stay_and_every_mth(opened, tmp_path):
    with opened(keep=2, keep_every=40) as checkpoints:
        for step in range(10, 110, 10):
            checkpoints.save(step, state(step))
        checkpoints.wait()
    assert sorted(steps(tmp_path / "checkpoints")) == [40, 80, 90, 100]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"40", "80", "90", "100", ".lock"}


def test_what_a_link_leads_to_is_not_deleted(opened, events, tmp_path):
    """Neither when checkpoints are pruned nor when a step is saved where a link is; the link is put aside."""
    with opened() as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step))
    there = {}
    for step in ("1", "2"):
        (tmp_path / "checkpoints" / step).rename(tmp_path / f"archived-{step}")
        (tmp_path / "checkpoints" / step).symlink_to(tmp_path / f"archived-{step}")
        there |= {path: path.read_bytes() for path in (tmp_path / f"archived-{step}").rglob("*") if path.is_file()}
    events.clear()
    with opened(keep=1) as checkpoints:
        checkpoints.save(2, state(2))
    assert [event[:2] for event in events] == [("checkpoint_damaged", 2), ("checkpoint", 2), ("checkpoint_damaged", 1)]
    assert "2 is a link, which no checkpoint is; it is now 2.damaged, and nothing was deleted" in events[0][2]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "2.damaged", "1.damaged", ".lock"}
    assert there == {path: path.read_bytes() for path in there} and len(there) > 8


def test_due_by_steps_and_by_minutes(opened, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    with opened(every=10, minutes=2.0) as checkpoints:
        assert [step for step in range(31) if checkpoints.due(step)] == [10, 20, 30]
        now[0] += 121
        assert checkpoints.due(31)
        checkpoints.save(31, state(1))
        assert not checkpoints.due(32)
    with opened(every=10) as checkpoints:
        now[0] += 1e6
        assert not checkpoints.due(32)


def test_the_step_that_was_just_saved_or_restored_is_not_saved_again(opened, events):
    with opened() as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.save(1, state(2))
    with opened() as checkpoints:
        assert int(checkpoints.restore(abstract(state(0))).step) == 1
        checkpoints.save(1, state(2))
    assert len(events) == 1


def test_a_step_that_is_done_again_replaces_the_old_one(opened, tmp_path):
    with opened() as checkpoints:
        for step, seed in [(1, 1), (2, 2), (1, 3)]:
            checkpoints.save(step, state(seed))
        checkpoints.wait()
        assert int(checkpoints.restore(abstract(state(0)), step=1).step) == 3
    assert sorted(steps(tmp_path / "checkpoints")) == [1, 2]


def test_a_step_by_name_is_that_one_or_an_error(opened, tmp_path):
    with opened() as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step))
        checkpoints.wait()
        assert int(checkpoints.restore(abstract(state(0)), step=1).step) == 1
        with pytest.raises(ValueError, match=r"step=5 must be a good checkpoint .* is missing; it has 1, 2$"):
            checkpoints.restore(abstract(state(0)), step=5)
        with pytest.raises(ValueError, match=r"must have a good checkpoint 77; it has 1, 2$"):
            read(tmp_path / "checkpoints", abstract(state(0)), step=77)
        (tmp_path / "checkpoints" / "1" / "manifest.json").unlink()
        with pytest.raises(ValueError, match=r"manifest\.json is missing"):
            checkpoints.restore(abstract(state(0)), step=1)


def test_what_a_killed_run_left_is_removed(opened, tmp_path):
    left = tmp_path / "checkpoints" / "9.tmp" / "state.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (tmp_path / "checkpoints" / "9.checksums-0.tmp").touch()
    with opened() as checkpoints:
        assert checkpoints.restore(abstract(state(0))) is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".lock"]


def test_two_runs_in_one_directory_are_refused(opened):
    with opened(), pytest.raises(ValueError, match="one at a time"):
        opened()
    opened().close()


def test_a_folder_in_place_of_the_lock_is_refused(opened, tmp_path):
    (tmp_path / "checkpoints" / ".lock").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"checkpoints/\.lock is a folder"):
        opened()


@pytest.mark.parametrize("setting", [{"every": 0}, {"keep": 0}, {"minutes": -1.0}])
def test_impossible_settings_are_refused(opened, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"checkpoint.{name}={value} must be at least"):
        opened(**setting)


def test_a_reader_takes_a_part_and_changes_nothing(opened, tmp_path, caplog):
    with opened() as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step))
        checkpoints.wait()
        (tmp_path / "checkpoints" / "2" / "state" / "_METADATA").unlink()
        before = sorted(str(path) for path in (tmp_path / "checkpoints").rglob("*"))
        model = read(tmp_path / "checkpoints", {"model": abstract(state(0)).model})["model"]
        assert bits(model) == bits(state(1).model)
        assert sorted(str(path) for path in (tmp_path / "checkpoints").rglob("*")) == before
    assert "state/_METADATA is missing" in caplog.text


def test_a_reader_takes_the_newest_before_a_step(opened, tmp_path):
    with opened() as checkpoints:
        for step in (1, 2, 5):
            checkpoints.save(step, state(step))
        checkpoints.wait()
    found = [int(read(tmp_path / "checkpoints", abstract(state(0)), before=before).step) for before in (2, 3, 5, 9)]
    assert found == [1, 2, 2, 5]
    with pytest.raises(ValueError, match="must have a good checkpoint"):
        read(tmp_path / "checkpoints", abstract(state(0)), before=1)


def test_a_reader_without_a_checkpoint_is_told(tmp_path):
    with pytest.raises(ValueError, match="must have a good checkpoint"):
        read(tmp_path / "nowhere", {"w": jnp.ones(3)})


def test_a_disk_that_refuses_leaves_the_run_and_what_was_saved(opened, events, tmp_path):
    """The limit on a file's size stands in for a full disk: the write fails half-way, as it does there."""
    big = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened() as checkpoints:
        checkpoints.save(1, big)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            checkpoints.save(2, big)
            with pytest.raises(RuntimeError, match="the last checkpoint was not saved"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [event[:2] for event in events] == [("checkpoint", 1), ("checkpoint_failed", 2)]
        assert "older checkpoints stand" in events[1][2] and "bytes are free" in events[1][2]
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", ".lock"}
        assert bits(checkpoints.restore(abstract(big))) == bits(big)
        checkpoints.save(3, big)
        checkpoints.wait()
        assert checkpoints.latest_step() == 3


def test_checksums_cost_what_their_sums_do(tmp_path):
    """Beside the bare sums of the same bytes in turns, so that a busy machine is busy for both."""
    content = os.urandom(1 << 20) * 32
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(content)

    def seconds(function):
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    ratios = [
        seconds(lambda: manifest.checksums(tmp_path, ["a", "b"]))
        / seconds(lambda: [zlib.crc32(content) for _ in range(2)])
        for _ in range(7)
    ]
    # About 1; with files read in small parts it is 4 to 15.
    assert sorted(ratios)[1] < 3, ratios


def test_a_manifest_is_whole_or_damaged(tmp_path):
    manifest.write(tmp_path, {}, step=1, fingerprints={}, leaves=[])
    whole = (tmp_path / manifest.NAME).read_bytes()
    assert manifest.read(tmp_path)["step"] == 1
    assert json.loads(whole)["crc32"]
    for length in range(len(whole)):
        (tmp_path / manifest.NAME).write_bytes(whole[:length])
        with pytest.raises(manifest.DamagedError, match=r"manifest\.json"):
            manifest.read(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(manifest.DamagedError, match="missing"):
        manifest.read(tmp_path)
