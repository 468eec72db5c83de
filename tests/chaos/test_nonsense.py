"""Nonsense where settings, text, a tokenizer or a checkpoint should be: the stated refusals and nothing else.

Everything goes through the interfaces that a run uses, with `pickle` made to raise: nothing here may ever be unpickled.
"""

import itertools
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import duckdb
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.chaos.victim import same, state
from vishwamai_eqx import command_line, data, manifest
from vishwamai_eqx.checkpoint import Checkpoints
from vishwamai_eqx.config import PRESETS, Config, DataConfig, to_dict
from vishwamai_eqx.tokenizer import VishwamAITokenizer
from vishwamai_eqx.validation import problems

TOKENIZER = Path(__file__).parents[1] / "vishwamai_eqx" / "huggingface" / "tokenizer.model"
ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
JSON = st.recursive(
    ANYTHING, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
FORMATS = {
    ".parquet": "FORMAT parquet",
    ".jsonl.gz": "FORMAT json, COMPRESSION gzip",
    ".jsonl.zst": "FORMAT json, COMPRESSION zstd",
}
often = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def nothing_is_unpickled(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)


def refused_or(function, *arguments):
    """What the function returns, or the sentence of its refusal; anything else that it raises fails the test."""
    try:
        return function(*arguments)
    except ValueError as error:
        assert str(error)
        return str(error)


def damaged(content: bytes, seed: int) -> bytes:
    """Bits flipped, a stretch cut out, doubled or replaced, or the end lost."""
    chance, changed = random.Random(seed), bytearray(content)
    for _ in range(chance.randint(1, 3)):
        if not changed:
            break
        at = chance.randrange(len(changed))
        to = min(len(changed), at + chance.choice([1, 3, 40, 1000]))
        match chance.randrange(5):
            case 0:
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at:to]
            case 2:
                changed[at:at] = changed[at:to]
            case 3:
                changed[at:to] = chance.randbytes(to - at)
            case 4:
                del changed[max(at, 1) :]
    return bytes(changed)


FIELDS = [
    (section, name) for section, values in to_dict(Config()).items() if isinstance(values, dict) for name in values
]


@often
@given(field=st.sampled_from([*FIELDS, ("seed",), ("mesh",), ("model",), ("more",)]), value=JSON)
@example(field=("optim", "batch_size"), value="8")
@example(field=("optim", "batch_size"), value=True)
@example(field=("model", "num_heads"), value=10**30)
@example(field=("data", "files"), value="text.txt")
@example(field=("model",), value=None)
def test_any_saved_configuration(field, value, tmp_path):
    values = to_dict(PRESETS["tiny"])
    at = values
    for name in field[:-1]:
        at = at[name]
    at[field[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = refused_or(command_line.parse, ["--run-dir", str(tmp_path)])
    if isinstance(found, Config):
        assert all(isinstance(sentence, str) for sentence in problems(found, 8))


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"{" * 9, b"[" * 100_000, b"null", b'{"model": {}}'])
def test_a_configuration_that_is_none(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert "config.json: " in refused_or(command_line.parse, ["--run-dir", str(tmp_path)])


@often
@given(
    st.lists(
        st.sampled_from(
            ["--steps", "--seed", "--data", "--mesh", "--model.window", "--optim.eps", "--json", "--replay"]
        )
        | st.text(max_size=6).filter(lambda word: word not in ("-h", "--help"))
        | st.integers().map(str)
        | st.floats().map(str),
        max_size=5,
    )
)
def test_any_command_line(tmp_path_factory, arguments):
    if any(argument.startswith("--he") or argument == "-h" for argument in arguments):
        return
    found = refused_or(command_line.parse, ["--run-dir", str(tmp_path_factory.getbasetemp() / "none"), *arguments])
    if isinstance(found, Config):
        assert all(isinstance(sentence, str) for sentence in problems(found, 8))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_any_data_file(suffix, tmp_path):
    """Noise, and good files damaged: refused with the file's name, or read as the text that they still are."""
    for number in range(12):
        (tmp_path / f"base-{number}.txt").write_text(f"{number} bottles on the wall\n" * 9)
    good = b"".join(json.dumps({"text": f"{n} bottles on the wall\n" * 9}).encode() + b"\n" for n in range(40))
    if suffix in FORMATS:
        (tmp_path / "source.jsonl").write_bytes(good)
        with duckdb.connect() as connection:
            connection.execute(f"COPY (FROM '{tmp_path}/source.jsonl') TO '{tmp_path}/converted' ({FORMATS[suffix]})")
        good = (tmp_path / "converted").read_bytes()
    tokenizer = VishwamAITokenizer(TOKENIZER)

    def use(content, name):
        (tmp_path / name).write_bytes(content)
        files = (f"{tmp_path}/base-*.txt", str(tmp_path / name))
        corpus = data.load_documents(DataConfig(files=files, held_out_share=0.3), cache_dir=tmp_path / "cache")
        return data.prepare(corpus, tokenizer, seq_len=16, batch_size=4, seed=0, cache_dir=tmp_path / "cache").batch(0)

    assert isinstance(refused_or(use, good, f"good{suffix}"), data.Batch)
    seen = 0
    for seed in range(8):
        content = damaged(good, seed) if seed % 4 else random.Random(seed).randbytes(300)
        found = refused_or(use, content, f"{seed}{suffix}")
        assert isinstance(found, data.Batch) or f"{seed}{suffix}" in found
        seen += isinstance(found, str)
    assert seen


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_any_tokenizer_folder(tmp_path):
    good = TOKENIZER.read_bytes()
    seen = 0
    for seed in range(60):
        content = damaged(good, seed) if seed % 4 else random.Random(seed).randbytes(seed)
        _written(tmp_path / "tokenizer.model", content)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            _written(tmp_path / name, damaged(b'{"model": {"type": "BPE"}}', seed))
        found = refused_or(VishwamAITokenizer, tmp_path)
        seen += isinstance(found, str)
        if not isinstance(found, str):
            refused_or(lambda tokenizer: tokenizer.decode(tokenizer.encode_ids("human beings 12 ▁\n")), found)
    assert seen


def test_any_checkpoint_folder(victims, tmp_path_factory):
    """Several things at once: files damaged, exchanged, linked, added; what comes back is whole, or nothing does."""
    outcomes, outside = [], tmp_path_factory.mktemp("outside") / "file"
    outside.write_text("not yours")
    for seed in range(12):
        chance, victim = random.Random(seed), victims()
        for _ in range(chance.randint(1, 4)):
            # Plain files alone: a write through a link that an earlier fault left would reach what it points to.
            paths = [path for path in [*victim.files(1), *victim.files(2)] if not path.is_symlink()]
            path, other = chance.sample(paths, 2)
            content = path.read_bytes()
            path.unlink()
            match chance.randrange(5):
                case 0:
                    path.write_bytes(damaged(content or b"x", seed))
                case 1:
                    path.write_bytes(other.read_bytes())
                case 2:
                    path.symlink_to(chance.choice([outside, other, "../..", "/dev/zero"]))
                case 3:
                    path.write_bytes(content)
                    (path.parent / "more.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
                case 4:
                    os.mkfifo(path)
        found = refused_or(victim.restore)
        step = 0 if isinstance(found, str) else int(found["step"])
        assert same(found, state(step)) if step else "has no good checkpoint left: " in found
        outcomes.append(step)
        shutil.rmtree(victim.directory)
    assert {0, 1} <= set(outcomes) and outside.read_text() == "not yours"


# Orbax closes its event loop when the first read fails, while others are still being answered.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        *itertools.product(["_METADATA", "manifest.ocdbt"], [b"{}", b'{"tree_metadata": "x"}', b"nonsense" * 40]),
        ("_METADATA", lambda content: content.replace(b"step", b"stop")),
    ],
)
def test_nonsense_with_the_right_checksum(victims, name, content):
    """Whoever can write a file can write its checksum: refused, and not put aside, as it was never a state."""
    victim = victims()
    folder = victim.directory / "2"
    path = folder / "state" / name
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    about = manifest.read(folder)
    del about["files"]
    manifest.write(folder, manifest.checksums(folder, manifest.files(folder)), **about)
    found = refused_or(victim.restore)
    assert isinstance(found, str) and f"{folder}/state holds no state although its files are as they were" in found
    assert victim.events == []
    shutil.rmtree(folder)
    assert same(victim.restore(), state(1))


def test_a_directory_that_leads_elsewhere(victims, tmp_path):
    """The whole of `checkpoints/` may be a link: people keep them on another disk. What is in it may not."""
    victim = victims()
    (tmp_path / "link").symlink_to(victim.directory)
    with Checkpoints(tmp_path / "link") as checkpoints:
        assert same(checkpoints.restore(state(0)), state(2))
    # A disk that is not mounted is not taken for one without checkpoints.
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"lost is a link to .*nowhere, which is not there: put that back"):
        Checkpoints(tmp_path / "lost")
    assert not (tmp_path / "nowhere").exists()
    (victim.directory / "2" / "state").rename(tmp_path / "elsewhere")
    (victim.directory / "2" / "state").symlink_to(tmp_path / "elsewhere")
    assert same(victim.restore(), state(1))
    assert "2/state is a link, which is refused" in victim.events[0][2]
