"""Rows of both tokenizations: the same text in the same columns, aligned where both have read the same bytes."""

from pathlib import Path

import numpy as np
import pytest

from vishwamai_eqx import data, prune
from vishwamai_eqx.config import DataConfig
from vishwamai_eqx.data import PairedBatch
from vishwamai_eqx.pairs import Pairs, aligned
from vishwamai_eqx.tokenizer import VishwamAITokenizer

SEQ_LEN = 24
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "alphabet",
    "gammadelta",
    "ünï",
    "漢字",
    "😀",
    "▁",
    "123",
    "  ",
    "\n",
    "def f(x):",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for index in range(40):
        text = f"{index} " + " ".join(rng.choice(WORDS, int(rng.integers(1, 40))))
        (folder / f"{index:02}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture(scope="module")
def corpus(folder) -> data.Corpus:
    found = DataConfig(files=(f"{folder}/*.txt",), held_out_share=0.2)
    return data.load_documents(found, cache_dir=folder)


@pytest.fixture(scope="module")
def teacher(corpus, folder) -> VishwamAITokenizer:
    # Without the rarest characters, which both then read in bytes.
    text = [each.replace("漢", "").replace("😀", "") for each in corpus.training_text(10**8)]
    return VishwamAITokenizer.train(text, 330, folder / "teacher")


def pairs(corpus, folder, teacher, student) -> Pairs:
    dataset = data.prepare(corpus, student, seq_len=SEQ_LEN, batch_size=8, seed=3, cache_dir=folder)
    return Pairs(dataset, teacher, "weights")


@pytest.fixture(scope="module")
def refined(corpus, folder, teacher) -> Pairs:
    return pairs(corpus, folder, teacher, teacher.pruned(305, folder / "student"))


def segments(batch: PairedBatch):
    """Row, and the columns of the student's and the teacher's tokens, of each segment."""
    for row, numbers in enumerate(batch.segment_ids):
        for segment in range(1, numbers.max() + 1):
            theirs = np.flatnonzero(batch.teacher_segment_ids[row] == segment)
            yield row, np.flatnonzero(numbers == segment), theirs


def test_each_segment_is_the_same_text_refined(refined):
    student, teacher = refined.student.tokenizer, refined.teacher
    found = prune.teacher_pieces(teacher.proto, student.proto)
    kinds = set()
    for n in range(12):
        batch = refined.batch(n)
        assert all(np.array_equal(a, b) for a, b in zip(batch, refined.student.batch(n), strict=False))
        for row, mine, theirs in segments(batch):
            pieces, tokens = batch.tokens[row, mine], batch.teacher_tokens[row, theirs]
            continued = int(pieces[0] != student.bos_id)
            assert tokens[0] == teacher.bos_id and mine[0] == theirs[0] and len(theirs) <= len(mine)
            np.testing.assert_array_equal(batch.teacher_positions[row, theirs], np.arange(len(theirs)))
            read = [piece for token in tokens[continued:].tolist() for piece in found.of(token)]
            # Only what `<bos>` takes the room of may be missing.
            assert pieces[: len(read)].tolist() == read and (continued or len(read) == len(pieces))
            places = batch.places[row, theirs]
            assert (places >= 0).tolist() == [not continued] + [True] * (len(theirs) - 1)
            for place, end in zip(places[continued:].tolist(), range(1 + continued, len(theirs) + 1), strict=True):
                text = student.decode_bytes(batch.tokens[row, mine[0] : place + 1])
                assert text == teacher.decode_bytes(tokens[:end])
            raw = student.decode_bytes(pieces)
            kinds |= {
                ("continued", continued),
                ("cut off", len(read) < len(pieces)),
                ("longer", len(theirs) < len(mine)),
            }
            kinds |= {("begins inside a character", bool(raw) and raw[0] & 0xC0 == 0x80)}
            kinds |= {("ends inside a character", raw.decode(errors="ignore").encode() != raw)}
        empty = batch.teacher_segment_ids == 0
        assert (batch.places[empty] == -1).all() and not batch.teacher_tokens[empty].any()
    assert len(kinds) == 10, sorted(kinds)


def test_a_batch_is_a_function_of_its_number_and_of_rows(refined):
    whole = refined.batch(5)
    for parts in ((slice(0, 3), slice(3, 8)), (slice(0, 8),)):
        read = [refined.batch(5, part) for part in parts]
        for field, pieces in zip(whole, zip(*read, strict=True), strict=True):
            np.testing.assert_array_equal(field, np.concatenate(pieces))
    again = Pairs(refined.student, VishwamAITokenizer(refined.teacher.model_path), "").batch(5)
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
    assert data.batch_hash(whole) != data.batch_hash(refined.batch(6))


def test_a_student_with_its_own_tokenizer_meets_the_teacher_where_bytes_do(corpus, folder, teacher):
    own = VishwamAITokenizer.train(["alp ha ga mmadel ta bet a 123 def f(x):"] * 9, 279, folder / "own")
    paired, met = pairs(corpus, folder, teacher, own), []
    batch = paired.batch(0)
    for row, mine, theirs in segments(batch):
        pieces = np.cumsum(own.piece_lengths[batch.tokens[row, mine]])
        tokens = np.cumsum(teacher.piece_lengths[batch.teacher_tokens[row, theirs]])
        for end, place in zip(tokens.tolist(), batch.places[row, theirs].tolist(), strict=True):
            assert (place >= 0) == (end in pieces) and (place < 0 or pieces[place - mine[0]] == end)
            met.append(place >= 0)
    assert 0.2 < np.mean(met) < 1


def test_what_is_no_text_is_read_byte_by_byte(refined):
    teacher = refined.teacher
    texts = [b"alpha \xbbbeta\xff\xfe \xc3\xbcn\xc3", b"", b"\x80", b"\xed\xa0\x80gamma", "漢字".encode()[1:5]]
    for text, ids in zip(texts, refined._read(texts), strict=True):
        assert ids[0] == teacher.bos_id and teacher.decode_bytes(ids[1:]) == text
    (whole,) = refined._read([b"alpha beta"])
    np.testing.assert_array_equal(whole[1:], teacher.encode_ids("alpha beta"))


def test_alignment_by_bytes():
    np.testing.assert_array_equal(aligned(np.array([0, 2, 1, 3]), np.array([0, 3, 3])), [0, 2, 3])
    np.testing.assert_array_equal(aligned(np.array([2, 1, 3]), np.array([0, 1, 1, 2, 2])), [-1, -1, 0, -1, 2])
