"""The documents of a run, known by content: read once, indexed, and split into training and held-out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64

from vishwamai_eqx import near_duplicates
from vishwamai_eqx.cache import MegabyteBar, cache_folder, locked, replaced
from vishwamai_eqx.config import DataConfig
from vishwamai_eqx.documents import BLOCK_BYTES, find_files, read
from vishwamai_eqx.manifest import remove

# What is known of a document: a hash of its bytes, how many they are, and the first document that is nearly the same.
DOCUMENT = np.dtype([("digest", np.uint64), ("size", np.int64), ("group", np.int64)])
# Raised when the index would come out differently.
FORMAT = 3
# The files of an index, the first of them with a checksum at its end, and those that are there while it is made.
INDEX = ("counts.int64", "documents")
WORKING = ("hashes", "sketches")


@dataclass(frozen=True)
class Block:
    """A part of a document's text, cut after a line; `last` closes the document."""

    document: int
    text: str
    last: bool


@dataclass(frozen=True)
class Corpus:
    """Every document of a run's data; the text itself stays on disk."""

    files: tuple[Path, ...]
    first: Int64[np.ndarray, "files_and_one"]
    """The number of each file's first document, and the number of documents."""
    source: Int32[np.ndarray, "documents"]
    """Which of the configuration's globs each document came by."""
    digests: UInt64[np.ndarray, "documents"]
    """A hash of each document's bytes."""
    sizes: Int64[np.ndarray, "documents"]
    """Bytes of each document."""
    held_out: Bool[np.ndarray, "documents"]
    """Whether training never sees a document."""
    data: DataConfig

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that name the text, wherever it lies."""
        content = blake2b(digest_size=8)
        content.update(self.digests.tobytes())
        content.update(self.sizes.tobytes())
        return content.hexdigest()

    def blocks(self, document: int = 0) -> Iterator[Block]:
        """The text from a document on, in order; refused when it is no longer what was indexed."""
        opened = int(np.searchsorted(self.first, document, side="right")) - 1
        for number in range(opened, len(self.files)):
            index, end = int(self.first[number]), int(self.first[number + 1])
            digest = blake2b(digest_size=8)
            for text, last in read(self.files[number], self.data.text_column):
                digest.update(text.encode())
                if last and (index >= end or _number(digest) != int(self.digests[index])):
                    raise _changed(self.files[number])
                if index >= document:
                    yield Block(index, text, last)
                if last:
                    index, digest = index + 1, blake2b(digest_size=8)
            if index != end:
                raise _changed(self.files[number])

    def training_text(self, size: int) -> Iterator[str]:
        """At most about `size` bytes of the training documents' text, picked by their hashes."""
        training = np.flatnonzero(~self.held_out)
        order = training[np.argsort(self.digests[training], kind="stable")]
        enough = int(np.searchsorted(np.cumsum(self.sizes[order]), size)) + 1
        chosen = np.zeros(len(self.sizes), bool)
        chosen[order[:enough]] = True
        for number in np.unique(np.searchsorted(self.first, np.flatnonzero(chosen), side="right") - 1).tolist():
            documents = range(int(self.first[number]), int(self.first[number + 1]))
            for block in self.blocks(documents[0]):
                if block.document not in documents:
                    break
                if chosen[block.document]:
                    yield block.text
                    size -= len(block.text.encode())
                    if size <= 0:
                        return


def load_documents(data: DataConfig, seed: int = 0, cache_dir: Path | None = None) -> Corpus:
    """Find the documents, read each once, or find that done, and choose those that are held out."""
    if not 0 < data.held_out_share < 1:
        raise ValueError(f"data.held_out_share={data.held_out_share}: give a share between 0 and 1, such as 0.05")
    if data.weights and (len(data.weights) != len(data.files) or not all(0 < w < np.inf for w in data.weights)):
        raise ValueError(
            f"data.weights={data.weights}: give a number above 0 for each of the {len(data.files)} globs of data.files"
        )
    sources = find_files(data)
    files = [path for source in sources for path in source]
    # Of a file that is written anew within a tick of its clock, or given its old time, the second time is another.
    table = [
        [str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        for path in files
        for status in [path.stat()]
    ]
    key = blake2b(json.dumps([FORMAT, data.text_column, table]).encode(), digest_size=8).hexdigest()
    folder = (cache_dir or cache_folder()) / "index" / key
    with locked(folder):
        counts, documents = _indexed(folder, len(files)) or _index(
            files, data.text_column, sum(size for _, size, *_ in table), folder
        )
    per_source = [part.sum() for part in np.split(counts, np.cumsum([len(source) for source in sources])[:-1])]
    digests, sizes = np.ascontiguousarray(documents["digest"]), np.ascontiguousarray(documents["size"])
    source = np.repeat(np.arange(len(sources), dtype=np.int32), per_source)
    held_out = choose_held_out(digests, sizes, documents["group"], data.held_out_share, seed)
    for number, weight in enumerate(data.weights):
        if held_out[source == number].all():
            raise ValueError(
                f"data.files={data.files[number]!r}: all of its documents are held out, so its weight {weight:g} "
                "has no rows to count; give it more documents or leave out data.weights"
            )
    return Corpus(
        files=tuple(files),
        first=np.concatenate([[0], np.cumsum(counts)]),
        source=source,
        digests=digests,
        sizes=sizes,
        held_out=held_out,
        data=data,
    )


def _indexed(folder: Path, files: int) -> tuple[Int64[np.ndarray, "files"], np.ndarray] | None:
    """What `_index` left in the folder, unless some of it is missing, cut short or damaged."""
    counts_path, documents_path = (folder / name for name in INDEX)
    try:
        *_, checksum = counts = np.fromfile(counts_path, np.int64)
        counts, documents = counts[:-1], np.memmap(documents_path, DOCUMENT, "r")
        sizes = [path.stat().st_size for path in (counts_path, documents_path)]
    except (OSError, ValueError):
        return None
    right = [8 * (files + 1), DOCUMENT.itemsize * int(counts.sum())]
    return (counts, documents) if sizes == right and checksum == _checksum(counts, documents) else None


def _checksum(counts: Int64[np.ndarray, "files"], documents: np.ndarray) -> np.int64:
    """Of all numbers of an index, in next to no time."""
    return counts.sum() ^ documents.view(np.int64).sum()


def _index(
    files: list[Path], text_column: str, size: int, folder: Path
) -> tuple[Int64[np.ndarray, "files"], np.ndarray]:
    """Documents of each file, and what is known of each document, which stays in the folder."""
    for name in (*WORKING, *INDEX):
        remove(folder / name)
    counts = np.zeros(len(files), np.int64)
    hashes_path, sketches_path = (folder / name for name in WORKING)
    with (
        hashes_path.open("wb") as hashes,
        sketches_path.open("wb") as sketches,
        MegabyteBar("reading", size) as bar,
    ):
        waiting: list[tuple[bytes, bool]] = []
        waiting_size = 0
        least = np.full(near_duplicates.MINIMA, near_duplicates.NOTHING)

        def write() -> None:
            nonlocal least
            for minima, (_, last) in zip(near_duplicates.minima([text for text, _ in waiting]), waiting, strict=True):
                least = np.minimum(least, minima)
                if last:
                    sketches.write(near_duplicates.sketch(least).tobytes())
                    least = np.full_like(least, near_duplicates.NOTHING)

        for number, path in enumerate(files):
            digest, length = blake2b(digest_size=8), 0
            for text, last in read(path, text_column):
                encoded = text.encode()
                digest.update(encoded)
                length += len(encoded)
                waiting.append((encoded, last))
                waiting_size += len(encoded)
                if last:
                    counts[number] += 1
                    hashes.write(np.array((_number(digest), length, 0), DOCUMENT).tobytes())
                    digest, length = blake2b(digest_size=8), 0
                if waiting_size >= BLOCK_BYTES:
                    write()
                    bar.advance(waiting_size)
                    waiting, waiting_size = [], 0
        write()
    documents = np.fromfile(hashes_path, DOCUMENT)
    sketched = np.memmap(sketches_path, np.uint16, "r", shape=(len(documents), near_duplicates.MINIMA))
    documents["group"] = near_duplicates.groups(np.ascontiguousarray(documents["digest"]), sketched)
    for name in WORKING:
        remove(folder / name)
    counts_path, documents_path = (folder / name for name in INDEX)
    with replaced(documents_path) as temporary:
        documents.tofile(temporary)
    # Last: where it is, the index is whole.
    with replaced(counts_path) as temporary:
        np.append(counts, _checksum(counts, documents)).tofile(temporary)
    return counts, documents


def choose_held_out(
    digests: UInt64[np.ndarray, "documents"],
    sizes: Int64[np.ndarray, "documents"],
    groups: Int64[np.ndarray, "documents"],
    share: float,
    seed: int,
) -> Bool[np.ndarray, "documents"]:
    """Whole groups of documents that together hold about `share` of the bytes.

    Groups are taken in the order of a hash of their content and the seed, those that would pass the share left out, so
    where files lie or what order they come in changes nothing and a new document moves few others.
    """
    _, which = np.unique(groups, return_inverse=True)
    group_sizes = np.bincount(which, weights=sizes).astype(np.int64)
    least = np.full(len(group_sizes), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, which, digests)
    order = np.argsort(_scramble(least ^ _scramble(np.array([seed % 2**64], np.uint64))), kind="stable")
    total = int(group_sizes.sum())
    room = int(share * total)
    taken = np.zeros(len(group_sizes), bool)
    while len(order := order[group_sizes[order] <= room]):
        filled = np.cumsum(group_sizes[order])
        fitting = int(np.searchsorted(filled, room, side="right"))
        taken[order[:fitting]] = True
        room -= int(filled[fitting - 1])
        order = order[fitting:]
    if group_sizes[taken].sum() == 0 or taken.all():
        if len(group_sizes) == 1:
            documents = (
                "there is one document" if len(digests) == 1 else f"the {len(digests)} documents are copies of one"
            )
            raise ValueError(
                f"data.held_out_share={share}: {documents}, and whole documents are held out; give two or more"
            )
        # Rounded up, so that the advice itself is not refused.
        least_share = np.ceil(1000 * group_sizes[group_sizes > 0].min() / total) / 1000
        raise ValueError(
            f"data.held_out_share={share}: none of the {len(digests)} documents is small enough to be held out whole; "
            f"give at least {least_share:.3f}, or more documents"
        )
    return taken[which]


def _scramble(values: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """A bijection of 64 bits in which every bit moves every other (splitmix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _number(digest: Any) -> int:
    return int.from_bytes(digest.digest(), "little")


def _changed(path: Path) -> ValueError:
    return ValueError(f"{path}: changed after it was indexed; start again, and leave the data as it is meanwhile")
