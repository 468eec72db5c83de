"""A pruned vocabulary: a subset of the teacher's, each merge of it can be made, and texts come out refined."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vishwamai_eqx import prune
from vishwamai_eqx import tokenizer as tokenizer_module
from vishwamai_eqx.huggingface_tokenizer import ModelProto, Piece
from vishwamai_eqx.tokenizer import VishwamAITokenizer

FIXTURE = Path(__file__).parent / "huggingface"
TEXTS = {name: each["text"] for name, each in json.loads((FIXTURE / "ids.json").read_text()).items()}
MARKUP = ["<start_of_turn>", "\n\n", "▁▁▁", "h", "<b>"]


def with_markup(model: ModelProto) -> None:
    """As in Gemma's: strings that are found before anything is merged."""
    others = [piece for piece in model.pieces if piece.piece not in MARKUP]
    del model.pieces[:]
    model.pieces.extend(others)
    model.pieces.extend(Piece(piece=text, score=0.0, type=Piece.USER_DEFINED) for text in MARKUP)


def with_late_halves(model: ModelProto) -> None:
    """Some merges rank above those that their halves are made by, so they wait for them."""
    merged = [piece for piece in model.pieces if piece.type == Piece.NORMAL and len(piece.piece) > 1]
    for early, late in zip(merged[3:300:7], reversed(merged[300:]), strict=False):
        early.score, late.score = late.score, early.score


def with_prefix(model: ModelProto) -> None:
    model.normalizer_spec.add_dummy_prefix = True


def as_it_is(model: ModelProto) -> None: ...


def made(folder: Path, change: Callable[[ModelProto], None]) -> VishwamAITokenizer:
    proto = ModelProto.FromString((FIXTURE / "tokenizer.model").read_bytes())
    change(proto)
    path = folder / f"{change.__name__}.model"
    path.write_bytes(proto.SerializeToString())
    return VishwamAITokenizer(path)


@pytest.fixture(scope="module", params=[as_it_is, with_markup, with_late_halves, with_prefix])
def teacher(request, tmp_path_factory) -> VishwamAITokenizer:
    return made(tmp_path_factory.mktemp("teacher"), request.param)


def sizes(teacher: VishwamAITokenizer) -> list[int]:
    """Of all there are, seven from no merge to all of them."""
    rank = prune.merge_ranks(teacher.proto)
    merges = sum(piece.type in prune.MERGED and len(piece.piece) > 1 for piece in teacher.proto.pieces)
    ranks, counts = np.unique(list(rank.values()), return_counts=True)
    found = [teacher.vocab_size - merges + int(n) for n in [0, *np.cumsum(counts)]]
    assert len(ranks) > 500
    return [*found[:: len(found) // 5], found[-1]]


def students(teacher: VishwamAITokenizer, folder: Path) -> list[VishwamAITokenizer]:
    return [teacher.pruned(size, folder / f"{size}") for size in sizes(teacher)]


def refined(found: prune.TeacherPieces, tokens: list[int]) -> list[int]:
    return [piece for token in tokens for piece in found.of(token)]


def test_pieces_are_the_teachers_and_each_merge_can_be_made(teacher, tmp_path):
    for student in students(teacher, tmp_path):
        found = prune.teacher_pieces(teacher.proto, student.proto)
        assert (np.diff(found.kept) > 0).all() and len(found.kept) == student.vocab_size
        assert [teacher.proto.pieces[id] for id in found.kept] == list(student.proto.pieces)
        kept = {piece.piece for piece in student.proto.pieces if piece.type in prune.MERGED}
        for piece in student.proto.pieces:
            assert student.proto.trainer_spec.vocab_size == student.vocab_size
            text = piece.piece
            if piece.type in prune.MERGED and len(text) > 1:
                assert any(text[:cut] in kept and text[cut:] in kept for cut in range(1, len(text))), text
        lost = [piece for id, piece in enumerate(teacher.proto.pieces) if id not in set(found.kept.tolist())]
        assert all(piece.type in prune.MERGED and len(piece.piece) > 1 for piece in lost)
        for name in ("pad_id", "unk_id", "bos_id", "eos_id"):
            assert found.of(getattr(teacher, name)) == [getattr(student, name)]


def test_texts_in_many_languages_are_refined_and_come_back(teacher, tmp_path):
    for student in students(teacher, tmp_path):
        found = prune.teacher_pieces(teacher.proto, student.proto)
        for name, text in TEXTS.items():
            ids = student.encode_ids(text)
            assert ids == refined(found, teacher.encode_ids(text)), (name, student.vocab_size)
            assert student.decode(ids) == text
    # The largest one has lost only what no text's tokens are.
    assert [student.proto.pieces[id].piece for id in ids] == [
        teacher.proto.pieces[id].piece for id in teacher.encode_ids(text)
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[tuple[VishwamAITokenizer, VishwamAITokenizer, prune.TeacherPieces]]:
    folder, result = tmp_path_factory.mktemp("pairs"), []
    for change in (as_it_is, with_markup, with_late_halves):
        teacher = made(folder, change)
        for size in sizes(teacher)[1:4]:
            student = teacher.pruned(size, folder / f"{change.__name__}-{size}")
            result.append((teacher, student, prune.teacher_pieces(teacher.proto, student.proto)))
    return result


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("▁ \n\0ahtonei<start_of_turn>аоеин的一"), max_size=80))
def test_any_text_is_refined_and_comes_back(pairs, text):
    for teacher, student, found in pairs:
        ids = student.encode_ids(text)
        assert ids == refined(found, teacher.encode_ids(text))
        assert student.decode(ids) == text


def test_the_command_saves_a_folder_and_the_map(tmp_path, capsys):
    source, main = FIXTURE / "tokenizer.model", tokenizer_module.main
    assert main(["prune", str(source), "--size", "900", "--directory", str(tmp_path / "made")]) == 0
    assert "900 of the 1400 pieces" in capsys.readouterr().out
    student, teacher = VishwamAITokenizer(tmp_path / "made"), VishwamAITokenizer(source)
    assert (
        student.vocab_size
        == 900
        == len(json.loads((tmp_path / "made" / "tokenizer.json").read_text())["model"]["vocab"])
    )
    saved, found = np.load(tmp_path / "made" / prune.TEACHER_PIECES), prune.teacher_pieces(teacher.proto, student.proto)
    for name in ("kept", "pieces", "ends"):
        np.testing.assert_array_equal(saved[name], getattr(found, name))
    for size, fix in (("20", "take "), ("1401", "take 1400")):
        assert main(["prune", str(source), "--size", size, "--directory", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert f"size={size}" in error and fix in error
    assert main(["prune", str(tmp_path / "made"), "--size", "800", "--directory", str(tmp_path / "made")]) == 2
    assert "the teacher's own" in capsys.readouterr().err


def test_merges_of_one_rank_are_kept_or_cut_together(tmp_path):
    def tied(model: ModelProto) -> None:
        for piece in model.pieces:
            piece.score = min(piece.score // 10 * 10, 0)

    teacher = made(tmp_path, tied)
    with pytest.raises(ValueError, match=r"size=900: .* take \d+") as refusal:
        teacher.pruned(900, tmp_path / "student")
    teacher.pruned(int(str(refusal.value).split()[-1]), tmp_path / "student")


def test_a_tokenizer_that_is_not_the_teachers_is_refused(tmp_path):
    teacher = made(tmp_path, as_it_is)
    own = VishwamAITokenizer.train(["the quick brown ꙮ fox jumps over the lazy dog " * 3], 300, tmp_path / "own")
    with pytest.raises(ValueError, match=r"which the teacher lacks.*tokenizer prune TEACHER\.model --size 300"):
        prune.teacher_pieces(teacher.proto, own.proto)
    other = ModelProto()
    other.CopyFrom(prune.prune(teacher.proto, 900))
    merged = [piece for piece in other.pieces if len(piece.piece) > 1 and piece.type == Piece.NORMAL]
    merged[5].score, merged[90].score = merged[90].score, merged[5].score
    with pytest.raises(ValueError, match=r"cuts text elsewhere.*--size 900"):
        prune.teacher_pieces(teacher.proto, other)
    teacher.proto.trainer_spec.model_type = 1
    with pytest.raises(ValueError, match="must be a byte-pair model"):
        teacher.pruned(900, tmp_path / "student")
