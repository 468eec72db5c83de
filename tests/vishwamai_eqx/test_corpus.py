"""The corpus: split by content, copies and near-copies on one side, read once, and known when it changes."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from vishwamai_eqx import cache, near_duplicates
from vishwamai_eqx import corpus as corpus_module
from vishwamai_eqx.config import DataConfig
from vishwamai_eqx.corpus import choose_held_out, load_documents


def prose(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(words))


def edited(text: str, seed: int, share: float) -> str:
    rng = random.Random(seed)
    return " ".join("edit" if rng.random() < share else word for word in text.split(" "))


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(80):
        (folder / f"{index:02}.txt").write_text(prose(index, 20 + 13 * index))
    return folder


def names(corpus, chosen) -> set[str]:
    return {corpus.files[index].name for index in np.flatnonzero(chosen)}


def load(folder, cache, **settings):
    return load_documents(DataConfig(files=(f"{folder}/*.txt",), **settings), 0, cache)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.3])
def test_the_held_out_share_is_of_bytes_and_goes_by_content(folder, tmp_path, share):
    first = load(folder, tmp_path / "cache", held_out_share=share)
    assert first.sizes[first.held_out].sum() / first.sizes.sum() == pytest.approx(share, rel=0.1)
    # Another place, other names and order: the same texts.
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in folder.iterdir():
        shutil.copyfile(path, moved / f"{99 - int(path.stem):02}.txt")
    second = load(moved, tmp_path / "cache", held_out_share=share)
    assert {f"{99 - int(name[:2]):02}.txt" for name in names(second, second.held_out)} == names(first, first.held_out)
    assert set(second.digests.tolist()) == set(first.digests.tolist())


def test_another_seed_holds_out_other_texts_and_a_new_text_moves_few(folder, tmp_path):
    files = DataConfig(files=(f"{folder}/*.txt",), held_out_share=0.2)
    first, second = (load_documents(files, seed, tmp_path / "cache") for seed in (0, 1))
    assert names(first, first.held_out) != names(second, second.held_out)
    (folder / "new.txt").write_text(prose(1000, 60))
    third = load_documents(files, 0, tmp_path / "cache")
    moved = names(first, first.held_out) ^ names(third, third.held_out)
    assert len(moved) <= 4


def test_copies_and_near_copies_stay_on_one_side(folder, tmp_path):
    groups = {}
    for index in range(0, 80, 4):
        text = (folder / f"{index:02}.txt").read_text()
        (folder / f"copy{index:02}.txt").write_text(text)
        groups[f"{index:02}.txt"] = {f"{index:02}.txt", f"copy{index:02}.txt"}
        # One word in a hundred changed, and set otherwise.
        if len(text) > 1500:
            (folder / f"near{index:02}.txt").write_text(edited(text, index, 0.01).upper().replace(" ", "\n"))
            groups[f"{index:02}.txt"].add(f"near{index:02}.txt")
    for seed in range(3):
        corpus = load_documents(DataConfig(files=(f"{folder}/*.txt",), held_out_share=0.3), seed, tmp_path / "cache")
        held_out = names(corpus, corpus.held_out)
        split = [group for group in groups.values() if 0 < len(group & held_out) < len(group)]
        assert not split
        assert any(group <= held_out for group in groups.values())


def test_near_duplicates_are_found_and_others_left_alone():
    texts = [prose(seed, 400) for seed in range(60)]
    near = [edited(text, 1, 0.02) for text in texts]
    half = [prose(seed, 400)[:1200] + prose(seed + 500, 400)[1200:] for seed in range(60)]
    encoded = [text.encode() for text in texts + near + half]
    sketches = near_duplicates.sketch(near_duplicates.minima(encoded))
    groups = near_duplicates.groups(np.arange(180, dtype=np.uint64), sketches)
    assert (groups[:60] == np.arange(60)).all()
    assert (groups[60:120] == np.arange(60)).mean() > 0.95
    # Half the same is not nearly the same.
    assert (groups[120:] == np.arange(120, 180)).all()


def test_the_minima_of_a_text_are_those_of_its_blocks():
    text = prose(0, 500).encode()
    alone = near_duplicates.minima([text])[0]
    together = near_duplicates.minima([b"before " * 9, text, b"", b"short", b"after " * 9])
    np.testing.assert_array_equal(together[1], alone)
    assert (together[2:4] == near_duplicates.NOTHING).all()
    overlap = near_duplicates.SHINGLE + 20
    parts = near_duplicates.minima([text[:1500], text[1500 - overlap :]])
    np.testing.assert_array_equal(parts.min(axis=0), alone)


def test_a_chain_of_near_copies_is_one_group():
    labels = near_duplicates._joined(np.arange(7), np.array([5, 3, 6]), np.array([3, 1, 4]))
    assert labels.tolist() == [0, 1, 2, 1, 4, 1, 4]
    assert near_duplicates._joined(labels, np.array([5]), np.array([0])).tolist() == [0, 0, 2, 0, 4, 0, 4]


def test_groups_are_taken_until_the_share_is_full():
    rng = np.random.default_rng(0)
    for _ in range(20):
        count = int(rng.integers(20, 200))
        digests = rng.integers(1 << 63, size=count, dtype=np.uint64)
        sizes = rng.integers(1, 1000, count)
        groups = np.minimum(np.arange(count), rng.integers(count, size=count))
        groups = groups[groups]
        taken = choose_held_out(digests, sizes, groups, 0.25, 0)
        assert sizes[taken].sum() <= 0.25 * sizes.sum()
        left = np.array([sizes[groups == group].sum() for group in np.unique(groups[~taken])])
        # Nothing that is left would still have fitted.
        assert sizes[taken].sum() + left.min() > 0.25 * sizes.sum() - 1
        assert all(len(set(taken[groups == group])) == 1 for group in np.unique(groups))


def test_a_second_start_reads_no_text(folder, tmp_path, monkeypatch):
    first = load(folder, tmp_path / "cache")
    monkeypatch.setattr(corpus_module, "read", lambda *_: pytest.fail("read again"))
    second = load(folder, tmp_path / "cache")
    np.testing.assert_array_equal(first.held_out, second.held_out)
    assert first.fingerprint == second.fingerprint
    monkeypatch.undo()
    # Touched, but the same: read again, and still the same text.
    os.utime(folder / "00.txt")
    assert load(folder, tmp_path / "cache").fingerprint == first.fingerprint


def damaged(path: Path, damage: str) -> None:
    """Leave something else where a file is."""
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        (path / "within").mkdir(parents=True)
    elif damage != "missing":
        kept = {"empty": b"", "cut": content[:-9], "longer": content + b"more"}
        kept |= {"zeros": bytes(len(content)), "noise": random.Random(0).randbytes(len(content))}
        path.write_bytes(kept[damage])


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer", "zeros", "noise", "a folder"])
@pytest.mark.parametrize("name", corpus_module.INDEX)
def test_a_damaged_index_is_made_again(folder, tmp_path, name, damage):
    first = load(folder, tmp_path / "cache")
    (path,) = tmp_path.glob(f"cache/index/*/{name}")
    content = path.read_bytes()
    damaged(path, damage)
    second = load(folder, tmp_path / "cache")
    np.testing.assert_array_equal(second.held_out, first.held_out)
    assert second.fingerprint == first.fingerprint and path.read_bytes() == content


def test_what_stands_in_the_way_of_an_index_goes(folder, tmp_path):
    first = load(folder, tmp_path / "cache")
    (index,) = tmp_path.glob("cache/index/*")
    shutil.rmtree(index)
    index.write_text("no folder")
    assert load(folder, tmp_path / "cache").fingerprint == first.fingerprint
    (index / "documents").unlink()
    (index / "lock").unlink()
    for name in ("lock", *corpus_module.WORKING):
        (index / name).mkdir()
    assert load(folder, tmp_path / "cache").fingerprint == first.fingerprint


def test_a_file_has_its_name_only_once_it_is_on_disk(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *given, name=name, original=original: done.append(name) or original(*given)
        )
    with cache.replaced(tmp_path / "file") as temporary:
        temporary.write_text("content")
        assert not done
    assert done == ["fsync", "replace"] and (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("change", ["edit", "truncate", "grow"])
def test_a_file_that_changes_is_refused_by_name(folder, tmp_path, change):
    corpus = load(folder, tmp_path / "cache")
    path = folder / "07.txt"
    content = path.read_text()
    path.write_text({"edit": content.replace("e", "E", 1), "truncate": content[:-1], "grow": content + "!"}[change])
    with pytest.raises(ValueError, match=r"07\.txt: changed after it was indexed"):
        list(corpus.blocks())
    # The documents before it are not in question.
    assert next(iter(corpus.blocks(8))).document == 8


def test_another_column_of_the_same_file_is_another_text(tmp_path):
    lines = [json.dumps({"text": f"text {n}" * 9, "body": f"body {n}" * 9}) for n in range(20)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    files = (str(tmp_path / "records.jsonl"),)
    for column in ("text", "body"):
        corpus = load_documents(DataConfig(files=files, text_column=column, held_out_share=0.2), 0, tmp_path / "cache")
        assert {block.text[:4] for block in corpus.blocks()} == {column}


def test_a_file_with_its_old_size_and_time_is_read_anew_by_the_next_start(folder, tmp_path):
    path = folder / "07.txt"
    corpus, content, status = load(folder, tmp_path / "cache"), path.read_text(), path.stat()
    path.write_text(content[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = load(folder, tmp_path / "cache")
    assert again.fingerprint != corpus.fingerprint
    assert sum(block.last for block in again.blocks()) == len(again.sizes)


@pytest.mark.parametrize("lines", [slice(0, 5), slice(0, 9)])
def test_records_that_come_or_go_are_noticed(tmp_path, lines):
    records = [f'{{"text": "{prose(index, 10)}"}}\n' for index in range(9)]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(records[:7]))
    corpus = load_documents(DataConfig(files=(str(path),), held_out_share=0.2), 0, tmp_path / "cache")
    path.write_text("".join(records[lines]))
    with pytest.raises(ValueError, match=r"r\.jsonl: changed"):
        list(corpus.blocks())


def test_training_text_is_a_bounded_part_of_the_training_documents(folder, tmp_path):
    corpus = load(folder, tmp_path / "cache", held_out_share=0.3)
    training = {corpus.files[index].read_text() for index in np.flatnonzero(~corpus.held_out)}
    assert set(corpus.training_text(1 << 30)) == training
    some = list(corpus.training_text(10_000))
    assert set(some) < training
    assert 10_000 <= sum(map(len, some)) < 20_000
