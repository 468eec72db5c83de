"""The token cache: the corpus's ids, made once, and gone on with after a kill."""

import fcntl
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vishwamai_eqx import cache, documents, token_cache
from vishwamai_eqx.config import DataConfig
from vishwamai_eqx.corpus import load_documents
from vishwamai_eqx.token_cache import tokenize
from vishwamai_eqx.tokenizer import VishwamAITokenizer

TOKENIZER = Path(__file__).parent / "huggingface"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for index in range(40):
        words = rng.choice(["human", "rights", "être", "👩‍👩‍👧", "\n", "  ", "▁", "12"], int(rng.integers(1, 4000)))
        (folder / f"{index:02}.txt").write_bytes((f"{index} " + " ".join(words)).encode())
    return folder


def load(folder, cache):
    return load_documents(DataConfig(files=(f"{folder}/*.txt",)), 0, cache)


def test_the_stream_is_every_document_between_its_marks(folder, tmp_path, monkeypatch):
    # Blocks and chunks that end anywhere.
    monkeypatch.setattr(documents, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(token_cache, "CHUNK_CHARACTERS", 3000)
    corpus, tokenizer = load(folder, tmp_path), VishwamAITokenizer(TOKENIZER)
    stream = tokenize(corpus, tokenizer, tmp_path)
    assert stream.tokens.dtype == np.uint16
    for path, start, end in zip(corpus.files, stream.starts, stream.ends, strict=True):
        expected = [tokenizer.bos_id, *tokenizer.encode_ids(path.read_bytes().decode()), tokenizer.eos_id]
        assert stream.tokens[start:end].tolist() == expected
    again = tokenize(corpus, tokenizer, tmp_path)
    np.testing.assert_array_equal(again.tokens, stream.tokens)


def test_a_second_start_encodes_nothing(folder, tmp_path, monkeypatch):
    corpus, tokenizer = load(folder, tmp_path), VishwamAITokenizer(TOKENIZER)
    first = tokenize(corpus, tokenizer, tmp_path)
    monkeypatch.setattr(VishwamAITokenizer, "encode_batch", lambda *_: pytest.fail("encoded again"))
    np.testing.assert_array_equal(tokenize(corpus, tokenizer, tmp_path).tokens, first.tokens)


@pytest.mark.parametrize("damage", ["tokens beyond the ends", "half an end", "ends beyond the tokens", "nothing left"])
def test_what_was_cut_short_goes_on(folder, tmp_path, damage):
    corpus, tokenizer = load(folder, tmp_path), VishwamAITokenizer(TOKENIZER)
    whole = tokenize(corpus, tokenizer, tmp_path)
    expected = np.array(whole.tokens)
    (tokens,), (ends,) = tmp_path.glob("tokens/*/tokens.uint16"), tmp_path.glob("tokens/*/ends")
    kept = {"tokens beyond the ends": (None, 160), "half an end": (None, 165), "ends beyond the tokens": (5000, None)}
    tokens_size, ends_size = kept.get(damage, (0, 0))
    tokens.write_bytes(tokens.read_bytes()[:tokens_size])
    ends.write_bytes(ends.read_bytes()[:ends_size])
    np.testing.assert_array_equal(tokenize(corpus, tokenizer, tmp_path).tokens, expected)
    assert ends.stat().st_size == 16 * len(corpus.sizes)


@pytest.mark.parametrize("damage", ["an end is noise", "ends are zeros", "ends of more documents", "a folder"])
def test_damage_is_thrown_away_with_what_follows_it(folder, tmp_path, damage):
    corpus, tokenizer = load(folder, tmp_path), VishwamAITokenizer(TOKENIZER)
    expected = np.array(tokenize(corpus, tokenizer, tmp_path).tokens)
    (tokens,), (ends,) = tmp_path.glob("tokens/*/tokens.uint16"), tmp_path.glob("tokens/*/ends")
    content = ends.read_bytes()
    for noise in (-(1 << 63), -1, 1, (1 << 63) - 1) if damage == "an end is noise" else (0,):
        kept = {
            "an end is noise": content[:160] + noise.to_bytes(8, "little", signed=True) + content[168:],
            "ends are zeros": content[:160] + bytes(len(content) - 160),
            "ends of more documents": content + content[-16:],
        }
        for path in (tokens, ends):
            if damage == "a folder":
                path.unlink()
                (path / "within").mkdir(parents=True)
            elif path == ends:
                path.write_bytes(kept[damage])
        np.testing.assert_array_equal(tokenize(corpus, tokenizer, tmp_path).tokens, expected)
        assert ends.read_bytes() == content


class Shifted(VishwamAITokenizer):
    """One whose ids are others, perhaps as large as those of 131,072 pieces."""

    def __init__(self, path, by):
        super().__init__(path)
        self.by, self.vocab_size = by, self.vocab_size + by

    @property
    def fingerprint(self):
        return str(self.by)

    def encode_batch(self, texts):
        return [ids + self.by for ids in super().encode_batch(texts)]


@pytest.mark.parametrize("by", [7, 129_000])
def test_each_vocabulary_has_ids_of_its_own_however_large_they_are(folder, tmp_path, by):
    corpus, tokenizer = load(folder, tmp_path), VishwamAITokenizer(TOKENIZER)
    ids = np.array(tokenize(corpus, tokenizer, tmp_path).tokens).astype(np.int64)
    others = tokenize(corpus, Shifted(TOKENIZER, by), tmp_path).tokens
    marks = np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id])
    np.testing.assert_array_equal(others, np.where(marks, ids, ids + by))
    other = VishwamAITokenizer(TOKENIZER, bos_token="[EOS]")
    assert tokenize(corpus, other, tmp_path).tokens[0] == tokenizer.eos_id


def test_one_process_at_a_time_writes(tmp_path):
    now = fcntl.LOCK_EX | fcntl.LOCK_NB
    with cache.locked(tmp_path), (tmp_path / "lock").open() as second, pytest.raises(BlockingIOError):
        fcntl.flock(second, now)
    with (tmp_path / "lock").open() as second:
        fcntl.flock(second, now)


def test_ids_that_are_not_those_written_are_made_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "SUMMED", 1000)
    corpus, tokenizer = load(folder, tmp_path), VishwamAITokenizer(TOKENIZER)
    expected = np.array(tokenize(corpus, tokenizer, tmp_path).tokens)
    (tokens,) = tmp_path.glob("tokens/*/tokens.uint16")
    content = tokens.read_bytes()
    for position in (0, len(content) // 2, len(content) - 1):
        flipped = bytearray(content)
        flipped[position] ^= 4
        tokens.write_bytes(flipped)
        np.testing.assert_array_equal(tokenize(corpus, tokenizer, tmp_path).tokens, expected)


KILLED = """
import sys, time
from pathlib import Path
from vishwamai_eqx import token_cache
from vishwamai_eqx.config import DataConfig
from vishwamai_eqx.corpus import load_documents
from vishwamai_eqx.tokenizer import VishwamAITokenizer

class Slow(VishwamAITokenizer):
    def encode_batch(self, texts):
        time.sleep(0.2)
        return super().encode_batch(texts)

token_cache.CHUNK_CHARACTERS = 20_000
token_cache.WORKERS = 1
cache = Path(sys.argv[2])
corpus = load_documents(DataConfig(files=(sys.argv[1] + "/*.txt",)), 0, cache)
token_cache.tokenize(corpus, Slow(sys.argv[3]), cache)
"""


def test_a_killed_tokenization_resumes(folder, tmp_path, monkeypatch):
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed"), str(TOKENIZER)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in tmp_path.glob("killed/tokens/*/ends")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (ends,) = tmp_path.glob("killed/tokens/*/ends")
    done = ends.stat().st_size // 16
    assert 0 < done < 40

    read = []
    corpus, tokenizer = load(folder, tmp_path / "killed"), VishwamAITokenizer(TOKENIZER)
    original = type(corpus).blocks
    monkeypatch.setattr(
        type(corpus), "blocks", lambda self, first=0: (read.append(b.document) or b for b in original(self, first))
    )
    resumed = tokenize(corpus, tokenizer, tmp_path / "killed")
    assert min(read) == done
    fresh = tokenize(load(folder, tmp_path / "fresh"), tokenizer, tmp_path / "fresh")
    np.testing.assert_array_equal(resumed.tokens, fresh.tokens)
    np.testing.assert_array_equal(resumed.ends, fresh.ends)


def test_an_interrupted_write_leaves_whole_documents(folder, tmp_path, monkeypatch):
    """An error half-way, such as a file that changed, keeps what was done before it."""
    monkeypatch.setattr(token_cache, "CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr(token_cache, "WORKERS", 1)
    corpus, tokenizer = load(folder, tmp_path), VishwamAITokenizer(TOKENIZER)
    path = folder / "30.txt"
    content = path.read_bytes()
    path.write_bytes(content + b"!")
    try:
        with pytest.raises(ValueError, match=r"30\.txt: changed"):
            tokenize(corpus, tokenizer, tmp_path)
    finally:
        path.write_bytes(content)
    (ends,) = tmp_path.glob("tokens/*/ends")
    assert 20 < ends.stat().st_size // 16 <= 30
    stream = tokenize(corpus, tokenizer, tmp_path)
    assert tokenizer.decode(stream.tokens[stream.starts[30] : stream.ends[30]]) == content.decode()
