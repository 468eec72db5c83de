"""Text to piece ids and back: SentencePiece, in a folder that Hugging Face reads too."""

import functools
import itertools
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import sentencepiece
import tyro
from jaxtyping import Int32

from vishwamai_eqx import documents, huggingface_tokenizer, prune, sentencepiece_training, words
from vishwamai_eqx.cache import replaced
from vishwamai_eqx.config import DataConfig
from vishwamai_eqx.huggingface_tokenizer import ModelProto, Piece

# Texts that `encode_ids` remembers, and the longest of them: at most a few megabytes.
CACHED_TEXTS = 1024
CACHED_CHARACTERS = 1024
# The shortest row that `encode` pads to; longer ones double, so that a jitted caller compiles few shapes.
SMALLEST_BUCKET = 16
# What Hugging Face reads beside the model.
DESCRIPTIONS = ("tokenizer_config.json", "tokenizer.json")
# SentencePiece writes a space as this character, so its own pieces cannot tell the two apart.
SPACE = "\u2581"


class VishwamAITokenizer:
    """A SentencePiece model with its special tokens.

    `model_path` is a `.model` file or a folder with `tokenizer.model` in it. A special token that the model does not
    have under the given name is the one that the model itself declares. `max_length` bounds `encode` alone. Every
    string comes back from its ids, U+2581 included, which is spelled in bytes. `proto` is the model as SentencePiece
    describes it.
    """

    def __init__(
        self,
        model_path: str | Path,
        max_length: int = 512,
        pad_token: str = "[PAD]",
        unk_token: str = "[UNK]",
        bos_token: str = "[BOS]",
        eos_token: str = "[EOS]",
    ):
        path = Path(model_path)
        self.model_path = path / "tokenizer.model" if path.is_dir() else path
        if max_length < 1:
            raise ValueError(f"max_length={max_length}: give at least 1 token")
        self.max_length = max_length
        self._processor, self.proto = _load(self.model_path)
        self.vocab_size: int = self._processor.vocab_size()
        self.unk_id = self._special("unk_token", unk_token, self._processor.unk_id())
        self.bos_id = self._special("bos_token", bos_token, self._processor.bos_id())
        self.eos_id = self._special("eos_token", eos_token, self._processor.eos_id())
        declared_pad = self._processor.pad_id()
        # Padding is masked wherever it stands, so a model that has no piece for it can lend another.
        self.pad_id = self._special("pad_token", pad_token, declared_pad if declared_pad >= 0 else self.unk_id)
        self._space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if not all(map(self._processor.is_byte, self._space_bytes)):
            raise ValueError(
                f"{self.model_path}: the model has no byte pieces, so text would be lost as {unk_token}; "
                "give one that was trained with byte_fallback=True"
            )
        # Then a text's ids are those of its words one after another.
        crossing = re.compile(f"\n|[^{SPACE}]{SPACE}")
        self._words_stand_alone = huggingface_tokenizer.expressible(self.proto) and not any(
            crossing.search(piece.piece) for piece in self.proto.pieces
        )
        self._remembered = functools.lru_cache(CACHED_TEXTS)(self._pieces)

    @classmethod
    def train(
        cls, texts: Iterable[str | Path], vocab_size: int, directory: str | Path, max_length: int = 512
    ) -> "VishwamAITokenizer":
        """A byte-pair tokenizer of `vocab_size` pieces, trained on texts (a `Path` is read) and saved in `directory`.

        Pieces do not cross lines, and digits stand alone.
        """
        return cls._made(sentencepiece_training.train(texts, vocab_size), directory, max_length)

    def pruned(self, vocab_size: int, directory: str | Path) -> "VishwamAITokenizer":
        """The tokenizer of `vocab_size` of these pieces that a student of this one's model takes, saved in `directory`.

        Beside it lies `prune.TEACHER_PIECES`: each of these pieces in those that are kept. **Raises** ValueError as
        `prune.prune` does.
        """
        student = self._made(prune.prune(self.proto, vocab_size).SerializeToString(), directory, self.max_length)
        prune.teacher_pieces(self.proto, student.proto).save(Path(directory) / prune.TEACHER_PIECES)
        return student

    @classmethod
    def _made(cls, model: bytes, directory: str | Path, max_length: int) -> "VishwamAITokenizer":
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / "tokenizer.model", model)
        for name in DESCRIPTIONS:
            # Of an earlier vocabulary.
            (directory / name).unlink(missing_ok=True)
        tokenizer = cls(directory, max_length)
        tokenizer.save(directory)
        return tokenizer

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.model` and, for Hugging Face, `tokenizer_config.json` and `tokenizer.json`.

        A tokenizer that came with the latter two keeps them. One whose normalisation or kind is not that of `train`
        has its `tokenizer.json` left to Hugging Face's own conversion.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / "tokenizer.model", self._processor.serialized_model_proto())
        for name in DESCRIPTIONS:
            source, target = self.model_path.parent / name, directory / name
            if source.exists() and self.model_path.name == "tokenizer.model":
                if source.resolve() != target.resolve():
                    shutil.copyfile(source, target)
            elif name == "tokenizer_config.json":
                tokens = {
                    f"{kind}_token": self._processor.id_to_piece(id)
                    for kind, id in (
                        ("pad", self.pad_id),
                        ("unk", self.unk_id),
                        ("bos", self.bos_id),
                        ("eos", self.eos_id),
                    )
                }
                _write(target, json.dumps(huggingface_tokenizer.config(self.proto, tokens), indent=2).encode())
            elif huggingface_tokenizer.expressible(self.proto):
                described = huggingface_tokenizer.tokenizer_json(self.proto, self.bos_id)
                _write(target, json.dumps(described, ensure_ascii=False).encode())

    def encode_ids(self, text: str) -> list[int]:
        """The ids of one text's pieces, without special tokens and never truncated; repeated texts are remembered."""
        if not isinstance(text, str):
            raise ValueError(_not_text([text]))
        return list(self._remembered(text) if len(text) <= CACHED_CHARACTERS else self._pieces(text))

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """`encode_ids` of many texts at once, past the cache; other threads run meanwhile.

        Words come again and again: of those in `texts` each is encoded once.
        """
        try:
            encoded = [text.encode() for text in texts]
        except (AttributeError, UnicodeEncodeError):
            raise ValueError(_not_text(list(texts))) from None
        found = words.distinct(encoded) if self._words_stand_alone else None
        if found is None:
            return [np.array(self._pieces(text), np.int32) for text in texts]
        pieces: list[list[int]] = self._processor.encode(found.words, num_threads=1)
        for place, word in enumerate(found.words):
            if SPACE in word:
                pieces[place] = self._spelled(word)
        return words.joined(pieces, found)

    def encode(
        self, text: str | Sequence[str], *, max_length: int | None = None, add_bos: bool = True, add_eos: bool = False
    ) -> dict[str, Int32[np.ndarray, "batch seq"]]:
        """`input_ids` and `attention_mask` of one text or several, a row each, padded on the right to a shared bucket.

        Rows are cut to `max_length` tokens (the constructor's if not given), the text's before those around it. The
        mask serves as segment ids as it is. **Raises** ValueError for what is no text.
        """
        limit = self.max_length if max_length is None else max_length
        if limit < 1:
            raise ValueError(f"max_length={limit}: give at least 1 token")
        start, end = [self.bos_id] * add_bos, [self.eos_id] * add_eos
        texts = list(text) if isinstance(text, Iterable) and not isinstance(text, (str, bytes)) else [text]
        room = max(0, limit - len(start) - len(end))
        rows = [(start + self.encode_ids(each)[:room] + end)[:limit] for each in texts]
        longest = max(map(len, rows), default=0)
        bucket = SMALLEST_BUCKET
        while bucket < longest:
            bucket *= 2
        input_ids = np.full((len(rows), min(bucket, limit)), self.pad_id, np.int32)
        attention_mask = np.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def decode(self, ids) -> str:
        """The text of one sequence of ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return self._processor.decode(self._checked(ids))

    def decode_batch(self, rows) -> list[str]:
        """The text of each row of ids."""
        return [self.decode(row) for row in rows]

    def decode_bytes(self, ids) -> bytes:
        """The bytes of a sequence of ids, which may end inside a character: what a stream decodes as it grows."""
        return b"".join([self.piece_bytes[id] for id in self._checked(ids)])

    @functools.cached_property
    def piece_bytes(self) -> list[bytes]:
        """What each piece stands for; nothing for special tokens."""
        result = []
        for piece in self.proto.pieces:
            if piece.type == Piece.BYTE:
                result.append(bytes([int(piece.piece[3:5], 16)]))
            elif piece.type in (Piece.NORMAL, Piece.USER_DEFINED):
                result.append(piece.piece.replace(SPACE, " ").encode())
            else:
                result.append(b"")
        return result

    @functools.cached_property
    def piece_lengths(self) -> Int32[np.ndarray, "vocab"]:
        """Bytes of each piece: summed over a row's targets, the bytes of source text that the row predicts."""
        return np.array([len(piece) for piece in self.piece_bytes], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that name this vocabulary."""
        return blake2b(self._processor.serialized_model_proto(), digest_size=8).hexdigest()

    def piece(self, id: int) -> str:
        """A piece as SentencePiece writes it, spaces as U+2581."""
        return self._processor.id_to_piece(id)

    def cache_info(self):
        """Hits, misses, capacity and fill of the cache of repeated texts."""
        return self._remembered.cache_info()

    def _pieces(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(self._spelled(text) if SPACE in text else self._processor.encode(text))
        except (RuntimeError, TypeError):
            raise ValueError(_not_text([text])) from None

    def _spelled(self, text: str) -> list[int]:
        """Ids of a text that holds U+2581, each of them as its three bytes."""
        first, *rest = self._processor.encode(text.split(SPACE))
        return first + [id for ids in rest for id in self._space_bytes + ids]

    def _checked(self, ids) -> list[int]:
        # In no type yet: an id may be larger than any.
        ids = np.asarray(ids).ravel().tolist()
        for id in ids:
            if not isinstance(id, int) or not 0 <= id < self.vocab_size:
                raise ValueError(f"id {id} is not a piece of {self.model_path}: they are 0 to {self.vocab_size - 1}")
        return ids

    def _special(self, name: str, token: str, declared: int) -> int:
        id = self._processor.piece_to_id(token)
        if self._processor.id_to_piece(id) == token:
            return id
        if declared < 0:
            raise ValueError(
                f"{name}={token!r}: {self.model_path} has no such piece and declares no other; give the name it has"
            )
        return declared


def _load(path: Path) -> tuple[sentencepiece.SentencePieceProcessor, ModelProto]:
    if not path.is_file():
        raise ValueError(
            f"{path}: no such tokenizer; give a SentencePiece .model file or a folder with tokenizer.model"
        )
    try:
        model = path.read_bytes()
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        # Of a damaged model there may be nothing left, and that is no error to SentencePiece.
        processor.id_to_piece(0)
        proto = ModelProto.FromString(model)
        # Nor is a piece that is no text, which comes back as bytes.
        if not all(isinstance(piece.piece, str) for piece in proto.pieces):
            raise ValueError
        return processor, proto
    except Exception:
        raise ValueError(f"{path}: not a SentencePiece model, or a damaged one; copy or train it again") from None


def _not_text(texts: Sequence[object]) -> str:
    for text in texts:
        if not isinstance(text, str):
            return f"text {text!r:.40} is of type {type(text).__name__}: give str"
        for position, character in enumerate(text):
            if "\ud800" <= character <= "\udfff":
                return (
                    f"text {text[max(0, position - 10) : position + 10]!r}: character {position} is half of a "
                    "surrogate pair, which UTF-8 cannot hold; decode the text with errors='replace'"
                )
    return "text could not be encoded"


def _train_command(
    files: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    vocab_size: int = 4096,
    directory: Path = Path("tokenizer"),
    text_column: str = "text",
) -> None:
    """Train a tokenizer on files and save it.

    Args:
        files: Globs of .txt, .md, .py, .jsonl and .parquet files; none: the running Python's standard library.
        vocab_size: Pieces, special tokens and bytes among them.
        directory: Folder to save it in.
        text_column: Where the text of a .jsonl or .parquet record is.
    """
    _require_writable(directory)
    found = documents.find_files(DataConfig(files=files, text_column=text_column))
    paths = [path for source in found for path in source]
    texts = (text for path in paths for text, _ in documents.read(path, text_column))
    stride = sum(path.stat().st_size for path in paths) // sentencepiece_training.ENOUGH_BYTES + 1
    tokenizer = VishwamAITokenizer.train(itertools.islice(texts, 0, None, stride), vocab_size, directory)
    print(f"{directory}: {tokenizer.vocab_size} pieces")


def _inspect_command(model: tyro.conf.Positional[Path], *, text: str | None = None, pieces: int = 0) -> None:
    """Show what a tokenizer is and what it makes of a text.

    Args:
        model: A SentencePiece .model file or a folder with tokenizer.model.
        text: A text to show the pieces of; - reads standard input.
        pieces: How many pieces of the vocabulary to list, the first merged ones first.
    """
    tokenizer = VishwamAITokenizer(model)
    print(f"{tokenizer.model_path}: {tokenizer.vocab_size} pieces, fingerprint {tokenizer.fingerprint}")
    specials = {"pad": tokenizer.pad_id, "unk": tokenizer.unk_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    print("  ".join(f"{name} {id} {tokenizer.piece(id)}" for name, id in specials.items()))
    merged = [id for id, piece in enumerate(tokenizer.piece_bytes) if len(piece) > 1][:pieces]
    for id in merged:
        print(f"{id:>7} {tokenizer.piece(id)!r}")
    if text is not None:
        shown = sys.stdin.read() if text == "-" else text
        ids = tokenizer.encode_ids(shown)
        size = len(shown.encode())
        print(f"{size} bytes, {len(ids)} pieces, {size / max(len(ids), 1):.2f} bytes a piece")
        print(" ".join(f"{tokenizer.piece(id)}:{id}" for id in ids))


def _prune_command(
    teacher: tyro.conf.Positional[Path], *, size: int = 131_072, directory: Path = Path("tokenizer")
) -> None:
    """Cut a teacher's tokenizer down to a student's, whose pieces its tokens are made of, and save it with the map.

    Args:
        teacher: A SentencePiece .model file of byte pairs, or a folder with tokenizer.model.
        size: Pieces to keep.
        directory: Folder to save it in.
    """
    found = VishwamAITokenizer(teacher)
    _require_writable(directory)
    if found.model_path.resolve() == (directory / "tokenizer.model").resolve():
        raise ValueError(f"directory={str(directory)!r} is the teacher's own; take another --directory")
    student = found.pruned(size, directory)
    print(f"{directory}: {student.vocab_size} of the {found.vocab_size} pieces of {found.model_path}")


def _require_writable(directory: Path) -> None:
    """Before the work whose fruit it is to hold."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ValueError(
            f"directory={str(directory)!r} cannot be written ({error.strerror}); take another --directory"
        ) from None


def _write(path: Path, content: bytes) -> None:
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m vishwamai_eqx.tokenizer train|prune|inspect`."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"train": _train_command, "prune": _prune_command, "inspect": _inspect_command},
            prog="python -m vishwamai_eqx.tokenizer",
            args=arguments,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
