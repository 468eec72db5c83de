"""Whatever happens to the files of a checkpoint: never wrong weights, always the last good step, the bad file named."""

import json
import os
import random
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chaos.victim import same, state
from vishwamai_eqx import checkpoint, manifest
from vishwamai_eqx.checkpoint import read


def flip(path, chance):
    data = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def truncate(path, chance):
    os.truncate(path, chance.randrange(path.stat().st_size))


def delete(path, chance):
    path.unlink()


def overwrite(path, chance):
    """The same length and other bytes, which a size alone would not show."""
    path.write_bytes(chance.randbytes(path.stat().st_size))


def link(path, chance):
    """The same bytes, through a link to outside."""
    outside = path.parents[3 if "state" in path.parts else 1] / f"outside-{chance.random()}"
    path.rename(outside)
    path.symlink_to(outside)


FAULTS = [flip, truncate, delete, overwrite, link]


def check(victim, named):
    """Step 1 is restored, the event names what was wrong with step 2, and its folder lies beside, out of the way."""
    assert same(victim.restore(), state(1))
    ((kind, step, text),) = victim.events
    assert (kind, step) == ("checkpoint_damaged", 2)
    assert named in text and "2.damaged" in text
    assert os.path.lexists(victim.directory / "2.damaged") and not os.path.lexists(victim.directory / "2")


def damage(victims, fault, chance):
    for number in range(len(victims().files(2))):
        victim = victims()
        path = victim.files(2)[number]
        fault(path, chance)
        check(victim, path.relative_to(victim.directory).as_posix())
        shutil.rmtree(victim.directory)


def test_undamaged(victims):
    victim = victims()
    assert same(victim.restore(), state(2))
    assert victim.events == []
    assert len(victim.files(2)) > 8


@pytest.mark.parametrize("fault", FAULTS)
def test_each_file_damaged(victims, fault):
    damage(victims, fault, random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 25))
@pytest.mark.parametrize("fault", [flip, truncate])
def test_each_file_damaged_elsewhere(victims, fault, seed):
    damage(victims, fault, random.Random(seed))


def test_without_the_checksums_the_damage_would_pass(victims, monkeypatch):
    """The test of these tests: with the contents unchecked a flipped bit comes back as a weight."""
    monkeypatch.setattr(checkpoint.manifest, "verify", lambda *_, **__: None)
    wrong = 0
    for seed in range(4):
        victim = victims()
        largest = max(victim.files(2), key=lambda path: path.stat().st_size)
        flip(largest, random.Random(seed))
        wrong += not same(victim.restore(), state(2))
    assert wrong


def test_every_byte_of_a_manifest(victims):
    """A bit flipped anywhere in it is seen, but for white space, where it does not matter."""
    folder = victims().directory / "2"
    whole, about = (folder / "manifest.json").read_bytes(), manifest.read(folder)
    seen = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        (folder / "manifest.json").write_bytes(changed)
        try:
            assert manifest.read(folder) == about
        except manifest.DamagedError:
            seen += 1
    assert seen > 0.5 * len(whole)


def test_a_delete_takes_the_manifest_first(victims, monkeypatch):
    """Where a rename is not one step, as on object stores, what is left is no checkpoint all the same."""
    victim = victims()
    monkeypatch.setattr(os, "rename", lambda *_: None)
    monkeypatch.setattr(manifest, "remove", lambda _: None)
    manifest.delete(victim.directory / "2")
    monkeypatch.undo()
    check(victim, "2/manifest.json is missing")


def test_an_empty_step(victims):
    victim = victims()
    (victim.directory / "3").mkdir()
    assert same(victim.restore(), state(2))
    assert victim.events == [
        (
            "checkpoint_damaged",
            3,
            "3/manifest.json is missing; it is now 3.damaged and checkpoint 2 is used",
        )
    ]
    assert sorted(checkpoint.steps(victim.directory)) == [1, 2]


def test_a_file_where_a_step_should_be(victims):
    victim = victims()
    (victim.directory / "3").write_text("not a folder")
    assert same(victim.restore(), state(2))
    assert "3 is not a folder" in victim.events[0][2]


def test_a_step_that_is_a_link(victims):
    victim = victims()
    (victim.directory / "2").rename(victim.directory / "elsewhere")
    (victim.directory / "2").symlink_to(victim.directory / "elsewhere")
    check(victim, "2 is not a folder")


def test_a_step_under_another_number(victims):
    victim = victims()
    shutil.copytree(victim.directory / "1", victim.directory / "3")
    assert same(victim.restore(), state(2))
    assert "3/manifest.json is that of step 1" in victim.events[0][2]


def test_a_file_that_nobody_listed(victims):
    victim = victims()
    (victim.directory / "2" / "state" / "d" / "more").write_text("")
    check(victim, "2/state/d/more is not in the manifest")


@pytest.mark.parametrize("path", ["../1/manifest.json", "/etc/passwd", "state/../../1/manifest.json"])
def test_a_manifest_that_points_outside(victims, path):
    """Its checksums are right, as those of somebody who means harm would be."""
    victim = victims()
    folder = victim.directory / "2"
    about = manifest.read(folder)
    about["files"][path] = manifest.checksum(folder / path)
    manifest.write(folder, about.pop("files"), **about)
    check(victim, f"{path} is missing")


def test_two_damaged_of_one_number(victims):
    victim = victims()
    for number in (1, 2):
        (victim.directory / "2" / "manifest.json").unlink()
        assert same(victim.restore(), state(1))
        shutil.copytree(victim.directory / "1", victim.directory / "2")
        assert len(victim.events) == number
    assert (victim.directory / "2.damaged").exists() and (victim.directory / "2.damaged-2").exists()


def test_nothing_good_is_refused_and_stays(victims):
    """Each time until somebody has looked: no run is begun again over what is left of it."""
    victim = victims()
    (victim.directory / "1" / "manifest.json").unlink()
    (victim.directory / "2" / "state" / "_METADATA").write_text("{")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no good checkpoint left: 2/state/_METADATA has .*; 1/manifest\.json"):
            victim.restore()
    assert victim.events == []
    assert {path.name for path in victim.directory.iterdir()} == {"1", "2", ".lock"}
    for step in ("1", "2"):
        (victim.directory / step).rename(victim.directory / f"{step}.away")
    assert victim.restore() is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@pytest.fixture(scope="module")
def folder(two_checkpoints, tmp_path_factory):
    return shutil.copytree(two_checkpoints / "2", tmp_path_factory.mktemp("fuzz") / "2")


@settings(max_examples=60)
@given(noise=st.binary(max_size=64) | JSON, key=st.sampled_from(["step", "files", "leaves", "bytes", "crc32", ""]))
def test_any_manifest_is_good_or_damaged(folder, noise, key):
    """Noise, any JSON, or the real one with a field replaced and the checksum put right: nothing else is raised."""
    whole = (folder / "manifest.json").read_bytes()
    try:
        if isinstance(noise, bytes):
            (folder / "manifest.json").write_bytes(noise)
        elif not key:
            (folder / "manifest.json").write_text(json.dumps(noise))
        else:
            about = {**json.loads(whole), key: noise}
            del about["crc32"]
            (folder / "manifest.json").write_text(
                json.dumps({**about, "crc32": noise if key == "crc32" else manifest._crc(about)})
            )
        try:
            same(read(folder.parent, state(0)), state(2))
        except ValueError as error:
            assert "must have a good checkpoint" in str(error) or "is of another model" in str(error)
    finally:
        (folder / "manifest.json").write_bytes(whole)
