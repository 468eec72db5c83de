"""Checkpoints: the whole training state, saved beside the run's work and verified before it is believed.

    RUN/checkpoints/400/manifest.json   leaves, files with checksums, configuration, code version
    RUN/checkpoints/400/state/          the arrays, as Orbax writes them
    RUN/checkpoints/600.tmp/            a save under way, or one that a kill ended: the next start removes it
    RUN/checkpoints/200.damaged/        put aside, because a file of it was not what its manifest says

A step is saved under a temporary name, its manifest is written last, and a rename makes it a checkpoint; deleting takes
the manifest first. So a folder with a number for its name is whole, or it was damaged afterwards, and `restore` finds
that out by checksum: Orbax alone trusts names, and returns flipped bits without a word.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from vishwamai_eqx import arrays, manifest
from vishwamai_eqx.arrays import State
from vishwamai_eqx.version import code_version

_logger = logging.getLogger(__name__)

# What may have happened to what a state learned from, by the name of its fingerprint.
_CHANGES = {
    "data": "files or their weights have changed in mid-run; put them back",
    "tokenizer": "the run's tokenizer has been exchanged; put its own back",
    "teacher": "the teacher has changed in mid-run; put its own weights back",
}
# How long the processes of a run wait for each other's part of a save.
_BARRIER_MS = 20 * 60 * 1000


def _log(kind: str, message: str, *, step: int | None = None) -> None:
    _logger.log(logging.INFO if kind == "checkpoint" else logging.WARNING, "%s: %s", kind, message)


class Checkpoints:
    """The checkpoints of a run that trains: it saves, prunes and restores them, and nobody else may at the time.

        with Checkpoints(run_dir / "checkpoints", every=500, on_event=log.event) as checkpoints:
            state = checkpoints.restore(abstract_state)
            ...
            if checkpoints.due(step):
                checkpoints.save(step, state)

    Every process of a run makes one and calls the same methods at the same steps. Leaving the block waits for the save
    under way and raises if it failed.

    **Arguments**

    - `directory`: made if it is not there.
    - `every`, `minutes`: `due` says yes at multiples of `every`, and when so many minutes have gone by since the last
      save (0: never for that).
    - `keep`: newest checkpoints that stay. Multiples of `keep_every` stay for good (0: none do).
    - `configuration`: JSON-ready settings, kept in every manifest.
    - `fingerprints`: names of the `data` and the `tokenizer` that the state learns from, kept in every manifest; others
      are refused.
    - `on_event`: called as `on_event(kind, message, step=step)`, from a thread too; the kinds are `checkpoint`,
      `checkpoint_failed` and `checkpoint_damaged`.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every: int = 500,
        minutes: float = 0.0,
        keep: int = 3,
        keep_every: int = 0,
        configuration: Mapping[str, Any] | None = None,
        fingerprints: Mapping[str, str] | None = None,
        on_event: Callable[..., None] = _log,
    ):
        for name, value, least in (("every", every, 1), ("keep", keep, 1), ("minutes", minutes, 0)):
            if value < least:
                raise ValueError(f"checkpoint.{name}={value} must be at least {least}")
        if Path(directory).is_symlink() and not Path(directory).exists():
            # A disk that is not mounted; made anew, what it leads to would hold a run that begins at step 0.
            raise ValueError(
                f"{directory} is a link to {os.readlink(directory)}, which is not there: put that back, or, to train "
                "from step 0 again, remove the link or take another --run-dir."
            )
        self.directory = Path(directory).resolve()
        self.every, self.minutes, self.keep, self.keep_every = every, minutes, keep, keep_every
        self._about = {
            "configuration": dict(configuration or {}),
            "code": code_version(),
            "fingerprints": dict(fingerprints or {}),
        }
        self._on_event = on_event
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._settled: int | None = None
        self._saved_at = time.monotonic()
        self._saves = 0
        self._primary = jax.process_index() == 0
        if self._primary:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.directory)
            for path in self.directory.glob("*.tmp"):
                manifest.remove(path)
        self._orbax = arrays.checkpointer()
        self._barrier = ocp.multihost.get_barrier_sync_fn()

    def due(self, step: int) -> bool:
        """Whether `step` is one to save, by steps or by minutes; all processes get the same answer."""
        if step > 0 and step % self.every == 0:
            return True
        if not self.minutes:
            return False
        late = time.monotonic() - self._saved_at > 60 * self.minutes
        if jax.process_count() == 1:
            return late
        # Clocks differ, and asking process 0 is a collective: not at every step.
        return step % 16 == 0 and bool(multihost_utils.broadcast_one_to_all(np.array(late)))

    def save(self, step: int, state: PyTree) -> None:
        """Save `state` as checkpoint `step`; returns once it is copied off the devices, whose buffers may be reused.

        A thread does the rest. A save that fails costs nothing but itself: older checkpoints stand, an event says what
        happened, and `wait` raises if it was the last one. The step that was just saved or restored is not saved again;
        any other of that number is replaced.
        """
        leaves = arrays.by_name(state)
        self._join()
        if step == self._settled:
            return
        self._saved_at, self._failure = time.monotonic(), None
        self._saves += 1
        folder = self.directory / f"{step}.tmp"
        about = {
            **self._about,
            "step": step,
            "time": time.time(),
            "bytes": sum(leaf.nbytes for leaf in leaves.values()),
            "leaves": [arrays.describe(name, leaf) for name, leaf in leaves.items()],
        }
        try:
            if self._primary:
                manifest.remove(folder)
                folder.mkdir()
            self._orbax.save(folder / "state", args=ocp.args.PyTreeSave(leaves))
        except Exception as error:
            self._fail(about, error)
            return
        self._thread = threading.Thread(target=self._finish, args=(folder, about), name="checkpoint")
        self._thread.start()

    def restore(self, abstract: State, *, step: int | None = None) -> State | None:
        """The newest good checkpoint, or the one of `step`; None if there is none, good or not.

        Damaged checkpoints after it are put aside. Where all are damaged none is touched: what is left of them may be
        mended, and a run that began again without them would hide and then prune what it was.

        **Arguments**

        - `abstract`: the state with arrays or `jax.ShapeDtypeStruct`s for leaves; each array is restored to its leaf's
          sharding, on whatever mesh that is. What is not an array is taken over as it is.
        - `step`: this one and no other.

        Raises ValueError if the leaves of the checkpoint are not those of `abstract`, the data or tokenizer that it
        learned from are not these, `step` is not a good one, all are damaged, or files that are as they were written
        hold no state.
        """
        self._join()
        wanted = arrays.by_name(abstract)
        damaged: dict[int, str] = {}
        while True:
            left = (number for number in steps(self.directory) if number not in damaged)
            chosen = self._agree(step if step is not None else max(left, default=None))
            if chosen is None and damaged:
                reasons = "; ".join(f"{number}/{reason}" for number, reason in damaged.items())
                raise ValueError(
                    f"{self.directory} has no good checkpoint left: {reasons}. Put back what was there, or, to train "
                    "from step 0 again, move these folders away or take another --run-dir."
                )
            if chosen is None:
                return None
            folder = self.directory / str(chosen)
            reason = self._damage(folder)
            if reason is None:
                break
            if step is not None:
                there = _those_of(self.directory)
                raise ValueError(f"step={step} must be a good checkpoint of {self.directory}: {reason}; {there}")
            damaged[chosen] = reason
        if self._primary:
            for number, reason in damaged.items():
                aside = manifest.put_aside(self.directory / str(number))
                message = f"{number}/{reason}; it is now {aside.name} and checkpoint {chosen} is used"
                self._on_event("checkpoint_damaged", message, step=number)
        about = manifest.read(folder)
        arrays.compare(folder, about, wanted, whole=True)
        _same_origin(folder, about, self._about["fingerprints"])
        self._settled = chosen
        return arrays.assemble(abstract, arrays.restore(self._orbax, folder, wanted))

    def latest_step(self) -> int | None:
        """The newest checkpoint there is, unverified."""
        return max(steps(self.directory), default=None)

    def wait(self) -> None:
        """Return once the save under way is a checkpoint; raises RuntimeError if the last save failed."""
        self._join()
        if self._failure is not None:
            raise RuntimeError(f"the last checkpoint was not saved: {self._failure}")

    def close(self) -> None:
        """Finish the save under way and give the directory up."""
        self._join()
        self._orbax.close()
        if self._primary:
            os.close(self._lock)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None:
            self.wait()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _finish(self, folder: Path, about: dict[str, Any]) -> None:
        """The thread of a save: what must be true before a folder is called a checkpoint, in that order."""
        index, count = jax.process_index(), jax.process_count()
        final, problem = self.directory / str(about["step"]), None
        parts = [self.directory / f"{about['step']}.checksums-{i}.tmp" for i in range(count)]
        try:
            self._orbax.wait_until_finished()
            names = manifest.files(folder)
            parts[index].write_text(json.dumps(manifest.checksums(folder, names[index::count])))
        except Exception as error:
            problem = error
        # The others wait here whatever happened to this one; a part that is missing tells process 0.
        self._barrier(key=f"checkpoint {self._saves} checksums", timeout_ms=_BARRIER_MS)
        if self._primary and problem is None:
            try:
                sums = {name: value for part in parts for name, value in json.loads(part.read_text()).items()}
                manifest.write(folder, sums, **about)
                self._delete(about["step"])
                os.rename(folder, final)
                _sync(self.directory)
            except Exception as error:
                problem = error
        self._barrier(key=f"checkpoint {self._saves} finished", timeout_ms=_BARRIER_MS)
        if not self._primary and problem is None and not final.exists():
            problem = RuntimeError("process 0 could not finish it")
        parts[index].unlink(missing_ok=True)
        if problem is not None:
            self._fail(about, problem)
            return
        self._settled = about["step"]
        if self._primary:
            seconds = time.time() - about["time"]
            self._on_event("checkpoint", f"saved {about['bytes']:,} bytes in {seconds:.1f} s", step=about["step"])
            self._prune()

    def _fail(self, about: dict[str, Any], error: Exception) -> None:
        # The words alone: an error's frames would keep the arrays of the state alive.
        self._failure = str(error)
        step = about["step"]
        # Orbax's would raise the errors of this save in the next one.
        with contextlib.suppress(Exception):
            self._orbax.close()
        self._orbax = arrays.checkpointer()
        if self._primary:
            manifest.remove(self.directory / f"{step}.tmp")
        free = shutil.disk_usage(self.directory).free
        message = f"step {step} was not saved, older checkpoints stand: {error} ({free:,} bytes are free on that disk, "
        self._on_event("checkpoint_failed", message + f"the state has {about['bytes']:,})", step=step)

    def _prune(self) -> None:
        for step in sorted(steps(self.directory))[: -self.keep]:
            if not self.keep_every or step % self.keep_every:
                self._delete(step)

    def _delete(self, step: int) -> None:
        folder = self.directory / str(step)
        if folder.is_symlink():
            # What it leads to is not the run's: deleting through it would take the manifest of somebody's archive.
            aside = manifest.put_aside(folder)
            message = f"{step} is a link, which no checkpoint is; it is now {aside.name}, and nothing was deleted"
            self._on_event("checkpoint_damaged", message, step=step)
        else:
            manifest.delete(folder)

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint; the processes share the reading and agree on the answer."""
        count = jax.process_count()
        reason = manifest.damage(folder, part=jax.process_index(), parts=count)
        if count == 1 or not np.any(multihost_utils.process_allgather(np.array(reason is not None))):
            return reason
        # Another process found something, and process 0 is the one to say what.
        return reason or (manifest.damage(folder) if self._primary else None) or "another process cannot read it"

    def _agree(self, step: int | None) -> int | None:
        """Process 0's answer, for all."""
        if jax.process_count() == 1:
            return step
        agreed = int(multihost_utils.broadcast_one_to_all(np.array(-1 if step is None else step, np.int32)))
        return None if agreed < 0 else agreed


def read(
    directory: str | Path,
    abstract: State,
    *,
    step: int | None = None,
    before: int | None = None,
    fingerprints: Mapping[str, str] | None = None,
) -> State:
    """Restore from a directory that others may be training in, without changing anything there.

    `abstract` may be a part of what was saved, `{"model": abstract_model}` for one: the names of its leaves decide. It
    is the newest checkpoint that is restored, or the newest one `before` a step, or that of `step` and no other.
    Damaged checkpoints are passed over with a warning, and so are those that are deleted meanwhile. Raises ValueError
    where none is left, the leaves do not fit, or one of those `fingerprints` of what was learned from is another.
    """
    directory, wanted, orbax = Path(directory).resolve(), arrays.by_name(abstract), arrays.checkpointer()
    found = [number for number in steps(directory) if before is None or number < before]
    for chosen in sorted(found, reverse=True) if step is None else [step]:
        folder = directory / str(chosen)
        reason = manifest.damage(folder)
        if reason is None:
            about = manifest.read(folder)
            arrays.compare(folder, about, wanted, whole=False)
            _same_origin(folder, about, fingerprints or {})
            return arrays.assemble(abstract, arrays.restore(orbax, folder, wanted))
        _logger.warning("checkpoint %s is passed over: %s", folder, reason)
    which = "" if step is None else f" {step}; {_those_of(directory)}"
    raise ValueError(f"directory={str(directory)!r} must have a good checkpoint{which}")


def check_origin(directory: Path, fingerprints: Mapping[str, str]) -> None:
    """Refuse, as `restore` would, what the newest checkpoint has not learned from; nothing of its state is read."""
    if (found := newest(directory)) is not None:
        _same_origin(*found, fingerprints)


def newest(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder and the manifest of the newest checkpoint with a whole one; whether its files are, `restore` finds."""
    for step in sorted(steps(directory), reverse=True):
        with contextlib.suppress(manifest.DamagedError, OSError):
            return directory / str(step), manifest.read(directory / str(step))
    return None


def steps(directory: Path) -> list[int]:
    """The steps that a directory has checkpoints of, in no order, good or not."""
    names = os.listdir(directory) if directory.is_dir() else ()
    return [int(name) for name in names if name.isdecimal() and name == str(int(name))]


def _those_of(directory: Path) -> str:
    return "it has " + (", ".join(map(str, sorted(steps(directory)))) or "none")


def _same_origin(folder: Path, about: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
    """Raise ValueError if a checkpoint learned from other data, whose batches and so steps would be others from here
    on, or from another tokenizer, whose ids would mean other text."""
    for name, here in fingerprints.items():
        if (then := about["fingerprints"].get(name)) != here:
            raise ValueError(
                f"{folder} learned from the {name} with fingerprint={then!r} and the {name} here has {here!r}: "
                f"{_CHANGES[name]}, or take another --run-dir"
            )


def _lock(directory: Path) -> int:
    """Hold the directory for this process; the kernel lets go of it however the process ends."""
    try:
        file = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except IsADirectoryError:
        raise ValueError(
            f"{directory / '.lock'} is a folder, where a run has the file that it locks: remove it"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ValueError(f"directory={str(directory)!r} is in use by another run: one at a time") from None
    return file


def _sync(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    file = os.open(directory, os.O_RDONLY)
    os.fsync(file)
    os.close(file)
