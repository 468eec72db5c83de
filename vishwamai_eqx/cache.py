"""Where what is made once is kept: the index, the token ids, trained tokenizers."""

import atexit
import contextlib
import fcntl
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vishwamai_eqx.manifest import remove

_log = logging.getLogger(__name__)

# What the cache's folder holds: a folder of folders each, named by what they were made from.
PARTS = ("index", "tokens")


def cache_folder() -> Path:
    """`$VISHWAMAI_CACHE`, or the user's cache folder; where that cannot be written, a temporary one, and a sentence."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = Path(os.environ.get("VISHWAMAI_CACHE") or user / "vishwamai_eqx")
    for each in (folder, *(folder / part for part in PARTS)):
        try:
            each.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=each):
                pass
        except OSError as error:
            return _stand_in(each, error.strerror)
    return folder


@functools.cache
def _stand_in(folder: Path, reason: str) -> Path:
    temporary = Path(tempfile.mkdtemp(prefix="vishwamai-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    _log.warning(
        "%s cannot be written (%s): this run keeps its cache in %s, and the next starts from nothing; "
        "set VISHWAMAI_CACHE to a folder that can be",
        folder,
        reason,
        temporary,
    )
    return temporary


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one process: a second one waits, then finds the work done. A killed process lets go."""
    lock = folder / "lock"
    try:
        if folder.is_file() or (folder.is_symlink() and not folder.exists()):
            remove(folder)
        if lock.is_dir():
            remove(lock)
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written ({error.strerror}); remove it, or set VISHWAMAI_CACHE to a folder that can be"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path to write, which becomes `path` when the block ends well: a file is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        # Otherwise a power cut can leave the name and not what it names.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class MegabyteBar:
    """A progress bar over bytes, on a terminal; silent elsewhere."""

    def __init__(self, title: str, total: int):
        console = Console(stderr=True)
        columns = (
            TextColumn(title),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("MB"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=total / 1e6)

    def __enter__(self) -> "MegabyteBar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, size: int) -> None:
        self._progress.advance(self._task, size / 1e6)
