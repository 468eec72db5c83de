"""A student's vocabulary out of its teacher's: fewer merges, so that every text's pieces refine the teacher's tokens.

Byte-pair encoding joins neighbours, the best-ranked merge first. Without the last merges it stops where the teacher's
own encoding was on its way: each of the teacher's tokens is some of the student's pieces in a row, in every text the
same ones. Characters stand after all merges in a SentencePiece model and bytes before them, so cutting the model's last
pieces would break it.
"""

import heapq
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Int32

from vishwamai_eqx.cache import replaced
from vishwamai_eqx.huggingface_tokenizer import ModelProto, Piece, TrainerSpec

# What the map of a teacher's tokens is called beside the tokenizer that it was made with.
TEACHER_PIECES = "teacher_pieces.npz"
# Pieces that are made by merging, and the characters that they are made of.
MERGED = (Piece.NORMAL, Piece.UNUSED)


@dataclass(frozen=True)
class TeacherPieces:
    """What each of the teacher's tokens is in the student's pieces."""

    kept: Int32[np.ndarray, "student"]
    """The teacher's id of each of the student's pieces, ascending."""
    pieces: Int32[np.ndarray, "pieces"]
    """The student's pieces of all the teacher's tokens, one token after another."""
    ends: Int32[np.ndarray, "teacher"]
    """Where each token's pieces end."""

    @property
    def starts(self) -> Int32[np.ndarray, "teacher"]:
        """Where each token's pieces begin."""
        return np.concatenate([np.zeros(1, np.int32), self.ends[:-1]])

    def of(self, token: int) -> list[int]:
        """The student's pieces of one token."""
        return self.pieces[self.starts[token] : self.ends[token]].tolist()

    def save(self, path: Path) -> None:
        """Write the three arrays as a NumPy archive."""
        with replaced(path) as temporary, temporary.open("wb") as file:
            np.savez(file, kept=self.kept, pieces=self.pieces, ends=self.ends)


def prune(teacher: ModelProto, size: int) -> ModelProto:
    """The model of `size` of the teacher's pieces, in their order: all that are not merged, and the best-ranked merges.

    **Raises** ValueError for a teacher that is not of byte pairs with byte fallback, or a size that no such model has.
    """
    if teacher.trainer_spec.model_type != TrainerSpec.BPE or not teacher.trainer_spec.byte_fallback:
        raise ValueError(
            "the teacher's tokenizer must be a byte-pair model with byte_fallback=True, whose merges have an order to "
            "cut; without one distil hidden states or text, with a tokenizer of the student's own"
        )
    rank = merge_ranks(teacher)
    base = [id for id, piece in enumerate(teacher.pieces) if piece.type not in MERGED or len(piece.piece) == 1]
    merges = sorted(rank, key=lambda id: (rank[id], id))
    room = size - len(base)
    # Merges of one rank are made side by side: half of them would not stop where the teacher was.
    cuts = [0, *(n for n, (a, b) in enumerate(pairwise(merges), 1) if rank[a] != rank[b]), len(merges)]
    if room not in cuts:
        near = min(cuts, key=lambda cut: abs(cut - room)) + len(base)
        raise ValueError(
            f"size={size}: the teacher's {len(teacher.pieces)} pieces can be cut to {len(base)} (characters, bytes and "
            f"special tokens) up to {len(base) + len(merges)}; take {near}"
        )
    kept = sorted([*base, *merges[:room]])
    student = ModelProto()
    student.CopyFrom(teacher)
    del student.pieces[:]
    student.pieces.extend(teacher.pieces[id] for id in kept)
    student.trainer_spec.vocab_size = size
    place = {id: at for at, id in enumerate(kept)}
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        setattr(student.trainer_spec, name, place.get(getattr(teacher.trainer_spec, name), -1))
    return student


def merge_ranks(model: ModelProto) -> dict[int, int]:
    """When each merged piece can first be made: its own rank, or that of a later piece that it is made of.

    Pieces that no merges make are left out: no text has them as tokens.
    """
    ids = {piece.piece: id for id, piece in enumerate(model.pieces) if piece.type in MERGED}
    made = {text: -1 for text in ids if len(text) == 1}
    scores = sorted({model.pieces[id].score for text, id in ids.items() if len(text) > 1}, reverse=True)
    place = {score: at for at, score in enumerate(scores)}
    queue = [(place[model.pieces[id].score], id, text) for text, id in ids.items() if len(text) > 1]
    heapq.heapify(queue)
    waiting: dict[str, list[str]] = {}
    found = {}
    while queue:
        rank, id, text = heapq.heappop(queue)
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        if text in made:
            continue
        if any(left in made and right in made for left, right in halves):
            made[text] = found[id] = rank
            for other in waiting.pop(text, ()):
                heapq.heappush(queue, (rank, ids[other], other))
        else:
            for half in {half for pair in halves for half in pair if half in ids and half not in made}:
                waiting.setdefault(half, []).append(text)
    return found


def teacher_pieces(teacher: ModelProto, student: ModelProto) -> TeacherPieces:
    """Each of the teacher's tokens in pieces of its pruned model.

    **Raises** ValueError where the student is not what `prune` makes of the teacher.
    """
    size, theirs = len(student.pieces), {piece.piece for piece in teacher.pieces}
    lacking = next(
        (f"has the piece {it.piece!r}, which the teacher lacks" for it in student.pieces if it.piece not in theirs),
        None,
    )
    if lacking is None:
        pruned = prune(teacher, size)
        if list(pruned.pieces) == list(student.pieces) and pruned.normalizer_spec == student.normalizer_spec:
            return _refine(teacher, student)
    raise ValueError(
        f"the student's tokenizer of {size} pieces is not the teacher's with fewer merges: it "
        f"{lacking or 'cuts text elsewhere'}, so the teacher's next token does not say what its next piece is; "
        f"take what python -m vishwamai_eqx.tokenizer prune TEACHER.model --size {size} makes, or learn of its layers "
        "alone: --distill.forward 0 --distill.hidden 1"
    )


def _refine(teacher: ModelProto, student: ModelProto) -> TeacherPieces:
    places = {piece.piece: id for id, piece in enumerate(student.pieces)}
    # Of a piece as it stands in the vocabulary, spaces written as U+2581, nothing is to be normalised any more.
    plain = ModelProto()
    plain.CopyFrom(student)
    plain.normalizer_spec.Clear()
    plain.normalizer_spec.name = "identity"
    plain.normalizer_spec.add_dummy_prefix = False
    plain.normalizer_spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=plain.SerializeToString())
    cut = [piece.piece for piece in teacher.pieces if piece.piece not in places]
    cut_pieces = dict(zip(cut, processor.encode(cut), strict=True))
    pieces = [[places[piece.piece]] if piece.piece in places else cut_pieces[piece.piece] for piece in teacher.pieces]
    kept = [id for id, piece in enumerate(teacher.pieces) if piece.piece in places]
    return TeacherPieces(
        kept=np.array(kept, np.int32),
        pieces=np.array([piece for each in pieces for piece in each], np.int32),
        ends=np.cumsum([len(each) for each in pieces], dtype=np.int32),
    )
