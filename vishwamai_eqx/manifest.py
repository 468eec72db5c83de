"""What a folder should hold: a list of its files with their checksums, written last and read first.

A folder without a whole manifest was not finished, and one whose files differ from it is damaged. Checksums are CRC-32:
they see every burst of up to 32 bits and miss one other accident in four billion, at three times the speed of SHA-256,
which would defend no better, since who can change a file can change the manifest.
"""

import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

NAME = "manifest.json"
Result = TypeVar("Result")
_CHUNK = 1 << 22


class DamagedError(Exception):
    """A folder that does not hold what its manifest says, or has none; the message names the file."""


def checksum(path: Path) -> dict[str, Any]:
    """Size and CRC-32 of a file."""
    size = crc = 0
    buffer = bytearray(_CHUNK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(memoryview(buffer)[:count], crc)
            size += count
    return {"bytes": size, "crc32": f"{crc:08x}"}


def checksums(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Checksums of files of a folder, by name."""
    return dict(zip(names, _parallel(lambda name: checksum(folder / name), names), strict=True))


def files(folder: Path) -> list[str]:
    """Names of all files under a folder, relative and sorted, the manifest's own apart.

    Raises DamagedError for whatever is neither a file nor a folder: a link may lead anywhere.
    """
    names = []

    def walk(at: Path, prefix: str) -> None:
        with os.scandir(at) as scan:
            entries = list(scan)
        for entry in entries:
            name = prefix + entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                walk(at / entry.name, name + "/")
            elif not stat.S_ISREG(mode):
                raise DamagedError(f"{name} is {'a link' if stat.S_ISLNK(mode) else 'not a file'}, which is refused")
            elif name != NAME:
                names.append(name)

    walk(folder, "")
    return sorted(names)


def write(folder: Path, sums: Mapping[str, Mapping[str, Any]], **about: Any) -> None:
    """Write a folder's manifest: `about` and the checksums, with one over all of it, whole or not at all."""
    body = {**about, "files": dict(sums)}
    fresh = folder / (NAME + ".tmp")
    with open(fresh, "w") as file:
        json.dump({**body, "crc32": _crc(body)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, folder / NAME)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, checked against its own checksum; raises DamagedError."""
    body: dict[str, Any] = {}
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise DamagedError(f"{folder.name} is not a folder")
        if not stat.S_ISREG((folder / NAME).lstat().st_mode):
            raise DamagedError(f"{NAME} is not a file")
        body = json.loads((folder / NAME).read_bytes())
        good = body.pop("crc32") == _crc(body) and _well_formed(body)
    except FileNotFoundError:
        raise DamagedError(f"{NAME} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise DamagedError(f"{NAME} is damaged")
    return body


def verify(folder: Path, manifest: Mapping[str, Any], *, part: int = 0, parts: int = 1) -> None:
    """Raise DamagedError unless the folder holds exactly the manifest's files, unchanged.

    Of `parts` processes that share the work each checks the contents of every parts-th file.
    """
    found, listed = files(folder), manifest["files"]
    for name in sorted(listed.keys() - set(found)):
        raise DamagedError(f"{name} is missing")
    for name in sorted(set(found) - listed.keys()):
        raise DamagedError(f"{name} is not in the manifest")

    def wrong(name: str) -> str | None:
        should = listed[name]
        try:
            if (size := (folder / name).stat().st_size) != should["bytes"]:
                return f"{name} has {size} bytes and should have {should['bytes']}"
            if (sums := checksum(folder / name)) != should:
                return f"{name} has checksum {sums['crc32']} and should have {should['crc32']}"
        except OSError as error:
            # Gone since it was listed, or a disk that cannot read it.
            return f"{name} cannot be read: {error.strerror}"
        return None

    for reason in _parallel(wrong, found[part::parts]):
        if reason is not None:
            raise DamagedError(reason)


def damage(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the checkpoint in a folder, beginning with the file's name; None if nothing is."""
    try:
        about = read(folder)
        if str(about["step"]) != folder.name:
            return f"{NAME} is that of step {about['step']}"
        verify(folder, about, part=part, parts=parts)
    except DamagedError as error:
        return str(error)
    return None


def put_aside(folder: Path) -> Path:
    """Rename a damaged folder to a name that means nothing; returns the new path."""
    aside, number = folder.with_name(f"{folder.name}.damaged"), 1
    while os.path.lexists(aside):
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged-{number}")
    os.rename(folder, aside)
    return aside


def delete(folder: Path) -> None:
    """Delete a folder, if it is there, manifest first: half a delete is no checkpoint. A link to one is left alone."""
    if folder.is_dir() and not folder.is_symlink():
        (folder / NAME).unlink(missing_ok=True)
        going = folder.with_name(f"{folder.name}.deleted.tmp")
        remove(going)
        os.rename(folder, going)
        remove(going)


def remove(path: Path) -> None:
    """Remove what a path names, a folder or not, if it is there and as far as it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _parallel(function: Callable[[str], Result], names: list[str]) -> list[Result]:
    # zlib and reads let go of the interpreter.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, names))


def _well_formed(body: dict[str, Any]) -> bool:
    """Whether what is read of a manifest has the types that are relied on; a checksum is right on any nonsense."""
    return (
        type(body["step"]) is int
        and all(type(value) is str for value in body["fingerprints"].values())
        and all(type(sums["bytes"]) is int and type(sums["crc32"]) is str for sums in body["files"].values())
        and all(
            type(leaf["path"]) is type(leaf["dtype"]) is str and all(type(size) is int for size in leaf["shape"])
            for leaf in body["leaves"]
        )
    )


def _crc(body: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
