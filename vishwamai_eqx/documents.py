"""Text on disk as documents: which there are, what is in them, and which of them are held out."""

import codecs
import glob
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from vishwamai_eqx.config import DataConfig

TEXT_SUFFIXES = (".txt", ".md", ".py")
# Documents are read in blocks of at most this many bytes, so that memory does not grow with the longest of them.
BLOCK_BYTES = 4 << 20
# Folders under the standard library that are installed packages, tests, or one table over and over.
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}


@dataclass(frozen=True)
class Block:
    """A piece of a document's text, cut after a line; `last` closes the document."""

    document: int
    text: str
    last: bool


@dataclass(frozen=True)
class Corpus:
    """Every document of a run's data, known by its content; the text itself stays on disk."""

    files: tuple[Path, ...]
    """The file of each document."""
    digests: UInt64[np.ndarray, "documents"]
    """A hash of each document's bytes."""
    sizes: Int64[np.ndarray, "documents"]
    """Bytes of each document."""
    held_out: Bool[np.ndarray, "documents"]
    """Whether training never sees a document."""

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that name the text, wherever it lies."""
        return blake2b(self.digests.tobytes() + self.sizes.tobytes(), digest_size=8).hexdigest()

    def blocks(self, first: int = 0) -> Iterator[Block]:
        """The text of the documents from `first` on, in order; refused when it is no longer what was indexed."""
        for index in range(first, len(self.files)):
            digest = blake2b(digest_size=8)
            for text, last in _read(self.files[index]):
                digest.update(text.encode())
                if last and int.from_bytes(digest.digest(), "little") != int(self.digests[index]):
                    raise ValueError(f"{self.files[index]}: changed while it was being read; start again")
                yield Block(index, text, last)

    def text(self, document: int) -> Iterator[str]:
        """One document's text, in blocks."""
        return (text for text, _ in _read(self.files[document]))


def load_documents(data: DataConfig, seed: int = 0) -> Corpus:
    """Find the documents, read each once, and choose those that are held out."""
    if not 0 < data.held_out_share < 1:
        raise ValueError(f"data.held_out_share={data.held_out_share}: give a share between 0 and 1, such as 0.05")
    files = find_files(data)
    digests, sizes = [], []
    for path in files:
        digest, size = blake2b(digest_size=8), 0
        for text, _ in _read(path):
            encoded = text.encode()
            digest.update(encoded)
            size += len(encoded)
        if size == 0:
            raise ValueError(f"{path}: empty; leave it out of data.files")
        digests.append(int.from_bytes(digest.digest(), "little"))
        sizes.append(size)
    content, lengths = np.array(digests, np.uint64), np.array(sizes, np.int64)
    return Corpus(tuple(files), content, lengths, choose_held_out(content, lengths, data.held_out_share, seed))


def find_files(data: DataConfig) -> list[Path]:
    """The files that the globs match, each once, in order of path."""
    if not data.files:
        return _standard_library()
    found: set[str] = set()
    for pattern in data.files:
        matches = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        if not matches:
            raise ValueError(f"data.files={pattern!r}: no file matches; give a glob of files that are there")
        for name in matches:
            if not name.endswith(TEXT_SUFFIXES):
                raise ValueError(f"{name}: not one of {', '.join(TEXT_SUFFIXES)}; narrow data.files={pattern!r}")
        found.update(matches)
    return [Path(name) for name in sorted(found)]


def _standard_library() -> list[Path]:
    files = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(name for name in folders if name not in NOT_LIBRARY)
        files += [Path(folder, name) for name in sorted(names) if name.endswith((".py", ".txt"))]
    return [path for path in files if path.stat().st_size > 0]


def _read(path: Path) -> Iterator[tuple[str, bool]]:
    """A file's text in blocks, and whether each is the last; line ends and byte-order marks stay as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, kept = 0, ""
    with path.open("rb") as file:
        while True:
            content = file.read(BLOCK_BYTES)
            last = len(content) < BLOCK_BYTES
            if b"\0" in content:
                raise ValueError(f"{path}: binary, with a zero byte at {read + content.index(0)}; leave it out")
            try:
                kept += decoder.decode(content, final=last)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}: not UTF-8 ({error.reason} near byte {read + error.start}); convert it or leave it out"
                ) from None
            read += len(content)
            if last:
                yield kept, True
                return
            cut = kept.rfind("\n") + 1 or len(kept)
            yield kept[:cut], False
            kept = kept[cut:]


def choose_held_out(
    digests: UInt64[np.ndarray, "documents"], sizes: Int64[np.ndarray, "documents"], share: float, seed: int
) -> Bool[np.ndarray, "documents"]:
    """Whole documents that together hold about `share` of the bytes; copies of one text stay on one side.

    Texts are taken in the order of a hash of their content and the seed, those that would pass the share left out, so
    where files lie or what order they come in changes nothing and a new document moves few others.
    """
    unique, which = np.unique(digests, return_inverse=True)
    group_sizes = np.bincount(which, weights=sizes).astype(np.int64)
    total = int(group_sizes.sum())
    room = share * total
    keys = [blake2b(f"{seed} {digest}".encode(), digest_size=8).digest() for digest in unique.tolist()]
    taken = np.zeros(len(unique), bool)
    for group in sorted(range(len(unique)), key=keys.__getitem__):
        if group_sizes[group] <= room:
            taken[group] = True
            room -= group_sizes[group]
    if not taken.any() or taken.all():
        least = group_sizes.min() / total
        fix = f"give at least {least:.2g}, or more documents" if len(unique) > 1 else "give at least two documents"
        raise ValueError(
            f"data.held_out_share={share}: of {len(digests)} documents with {len(unique)} different texts, "
            f"none is small enough to be held out; {fix}"
        )
    return taken[which]
