"""The tokenizer: every string comes back, and Hugging Face finds the same ids."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vishwamai_eqx import tokenizer as tokenizer_module
from vishwamai_eqx.tokenizer import CACHED_CHARACTERS, CACHED_TEXTS, VishwamAITokenizer

FIXTURE = Path(__file__).parent / "huggingface"
TEXTS = json.loads((FIXTURE / "ids.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> VishwamAITokenizer:
    return VishwamAITokenizer(FIXTURE)


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_hugging_faces(tokenizer, name):
    assert tokenizer.encode_ids(TEXTS[name]["text"]) == TEXTS[name]["ids"]


@pytest.mark.slow
def test_saved_folder_gives_the_same_ids_in_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for name, each in TEXTS.items():
        assert theirs(each["text"])["input_ids"] == [tokenizer.bos_id, *each["ids"]], name
        assert theirs(each["text"], add_special_tokens=False)["input_ids"] == each["ids"], name
        assert theirs.decode(each["ids"]) == each["text"], name
    assert (
        theirs("a b")["input_ids"]
        == tokenizer.encode("a b")["input_ids"][0][: len(theirs("a b")["input_ids"])].tolist()
    )
    assert [theirs.pad_token_id, theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id] == [0, 1, 2, 3]
    # The same from the model alone, so that nothing rests on the tokenizer.json that is written here.
    (tmp_path / "tokenizer.json").unlink()
    converted = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        json.loads(converted.backend_tokenizer.to_str())["model"]
        == json.loads(theirs.backend_tokenizer.to_str())["model"]
    )


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("▁ \n\r\t\0a[]BOS<0x>\u2028"), max_size=60))
def test_every_string_comes_back(text):
    tokenizer = VishwamAITokenizer(FIXTURE)
    ids = tokenizer.encode_ids(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.piece_lengths[np.array(ids, int)].sum() == len(text.encode())
    assert not {tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_long_texts_are_cut_where_nothing_changes(tokenizer):
    texts = ["".join(each["text"] for each in TEXTS.values()) * 3, "x" * 5000, "", "a\n" * 400, "▁\n" * 300]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == tokenizer.encode_ids(text)
    assert tokenizer.encode_ids(texts[0]) == tokenizer._processor.encode(texts[0])


def test_rows_are_padded_to_a_bucket_and_masked(tokenizer):
    encoded = tokenizer.encode(["human beings", "x" * 40, ""])
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    assert ids.shape == mask.shape == (3, 64) and ids.dtype == mask.dtype == np.int32
    assert mask.sum(axis=1).tolist() == [len(tokenizer.encode_ids(text)) + 1 for text in ("human beings", "x" * 40, "")]
    assert (ids[mask == 0] == tokenizer.pad_id).all() and (ids[:, 0] == tokenizer.bos_id).all()
    assert tokenizer.decode_batch(ids) == ["human beings", "x" * 40, ""]
    one = tokenizer.encode("human beings", add_bos=False, add_eos=True)
    assert one["input_ids"].shape == (1, 16)
    assert one["input_ids"][0, one["attention_mask"].sum() - 1] == tokenizer.eos_id


def test_max_length_cuts_calls_and_nothing_else():
    tokenizer = VishwamAITokenizer(FIXTURE, max_length=20)
    text = "x" * 100
    assert tokenizer.encode(text)["input_ids"].shape == (1, 20)
    assert tokenizer.encode(text, max_length=3)["input_ids"].tolist() == [
        [tokenizer.bos_id, *tokenizer.encode_ids("xx")]
    ]
    around = tokenizer.encode(text, max_length=4, add_eos=True)["input_ids"].tolist()
    assert around == [[tokenizer.bos_id, *tokenizer.encode_ids("xx"), tokenizer.eos_id]]
    assert len(tokenizer.encode_ids(text)) == len(tokenizer.encode_batch([text])[0]) == 100


def test_what_is_no_text_is_refused_in_words():
    """Where it is used, without the tests' checks of types."""
    program = f"""
from vishwamai_eqx.tokenizer import VishwamAITokenizer
tokenizer = VishwamAITokenizer({str(FIXTURE)!r})
for text in (b"x", 5, None, ["a", b"x"]):
    try:
        tokenizer.encode(text)
    except ValueError as refusal:
        print(refusal)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [line.partition(" is of")[0] for line in ran.stdout.splitlines()] == [
        "text b'x'",
        "text 5",
        "text None",
        "text b'x'",
    ]


def test_repeated_texts_are_remembered_within_bounds():
    tokenizer = VishwamAITokenizer(FIXTURE)
    for text in ("one", "two", "one"):
        tokenizer.encode_ids(text)
    assert (tokenizer.cache_info().hits, tokenizer.cache_info().misses) == (1, 2)
    tokenizer.encode_ids("one").append(-1)
    assert tokenizer.encode_ids("one") == tokenizer._processor.encode("one")
    tokenizer.encode_ids("x" * (CACHED_CHARACTERS + 1))
    for number in range(CACHED_TEXTS + 10):
        tokenizer.encode_ids(str(number))
    assert tokenizer.cache_info().currsize == CACHED_TEXTS
    assert tokenizer.cache_info().misses == 2 + CACHED_TEXTS + 10


def test_training_again_gives_the_same_folder(tmp_path):
    texts = [each["text"] for each in TEXTS.values()]
    first = VishwamAITokenizer.train(texts, 800, tmp_path / "a")
    source = tmp_path / "texts.txt"
    source.write_bytes("\n".join(texts).encode())
    second = VishwamAITokenizer.train([source], 800, tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    names = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    # Over an earlier vocabulary, whose descriptions must not stay.
    VishwamAITokenizer.train(texts, 700, tmp_path / "a")
    assert len(json.loads((tmp_path / "a" / "tokenizer.json").read_text())["model"]["vocab"]) == 700


def test_the_largest_vocabulary_that_is_named_fits(tmp_path):
    text = ["the quick brown fox jumps over the lazy dog " * 3]
    with pytest.raises(ValueError, match="at most") as refusal:
        VishwamAITokenizer.train(text, 4096, tmp_path)
    largest = int(re.search(r"at most (\d+) pieces", str(refusal.value))[1])
    assert VishwamAITokenizer.train(text, largest, tmp_path).vocab_size == largest
    with pytest.raises(ValueError, match="at least") as refusal:
        VishwamAITokenizer.train(text, 20, tmp_path)
    smallest = int(re.search(r"need (\d+)", str(refusal.value))[1])
    assert VishwamAITokenizer.train(text, smallest, tmp_path).vocab_size == smallest


def test_a_brought_tokenizer_keeps_what_it_came_with(tmp_path):
    (tmp_path / "brought").mkdir()
    shutil.copyfile(FIXTURE / "tokenizer.model", tmp_path / "brought" / "tokenizer.model")
    (tmp_path / "brought" / "tokenizer.json").write_text('{"their": "own"}')
    brought = VishwamAITokenizer(tmp_path / "brought")
    brought.save(tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_text() == '{"their": "own"}'
    assert json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())["bos_token"] == "[BOS]"
    assert VishwamAITokenizer(tmp_path / "run").fingerprint == brought.fingerprint


def test_special_tokens_by_another_name_are_the_models_own():
    tokenizer = VishwamAITokenizer(FIXTURE, bos_token="<s>", eos_token="[BOS]")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 2)


def test_commands(tmp_path, capsys):
    source = tmp_path / "text.txt"
    source.write_text("one fish two fish red fish blue fish\n" * 20)
    main = tokenizer_module.main
    assert main(["train", str(source), "--vocab-size", "290", "--directory", str(tmp_path / "made")]) == 0
    assert main(["inspect", str(tmp_path / "made"), "--text", "fish", "--pieces", "2"]) == 0
    output = capsys.readouterr().out
    assert "290 pieces" in output and "bytes a piece" in output and "bos 2 [BOS]" in output
    assert main(["train", str(tmp_path / "none*.txt")]) == 2
    assert "no file matches" in capsys.readouterr().err


def words(count: int, seed: int) -> str:
    """Made-up words by Zipf's law, a hundred to a line, in four scripts."""
    rng = np.random.default_rng(seed)
    letters = [
        list("abcdefghijklmnopqrstuvwxyz"),
        list("абвгдежзийклмнопрстуфхцчшщ"),
        list("αβγδεζηθικλμνξοπρστυφχψω"),
        list("कखगघचछजझटठडढतथदधनपफबभमयरल"),
    ]
    vocabulary = ["".join(rng.choice(letters[index % 4], int(rng.integers(3, 10)))) for index in range(60_000)]
    chosen = np.minimum(rng.zipf(1.2, count), len(vocabulary)) - 1
    lines = [" ".join(vocabulary[index] for index in chosen[at : at + 100]) for at in range(0, count, 100)]
    return "\n".join(lines + vocabulary)


@pytest.mark.slow
def test_131072_pieces_are_trained_saved_loaded_and_used(tmp_path):
    text = words(1_500_000, 0)
    VishwamAITokenizer.train([text], 131_072, tmp_path)
    before = time.perf_counter()
    tokenizer = VishwamAITokenizer(tmp_path)
    assert time.perf_counter() - before < 5
    assert (
        tokenizer.vocab_size == 131_072 == len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"])
    )
    assert tokenizer.decode(tokenizer.encode_ids(text[:100_000])) == text[:100_000]
    assert max(tokenizer.encode_ids(text)) > 65_535
