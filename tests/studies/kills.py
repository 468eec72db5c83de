"""A run of `train.py` killed at random moments, each followed by a resume, beside one that nobody killed.

    python -m tests.studies.kills --kills 120 --seed 1 --minutes 30 --output tests/studies/kills.json
    python -m tests.studies.kills --seed 1 --history 7         the kills of one history again

A history is one run that is killed up to six times and then left to its end. A kill is drawn from the seed:

    time     SIGKILL, SIGTERM, or SIGTERM and then SIGKILL, some rows and up to 80 ms after the start of a step
    change   SIGKILL at the n-th change of a name or a file from the start on: indexing, tokenizing, opening, saving
    delete   SIGKILL at the n-th change that deleting a checkpoint makes
    row      SIGKILL in the middle of the n-th write to the logbook, which leaves a torn row

After each kill the checkpoints that are there must be whole and the rows that are there those of the undisturbed run;
at the end all rows, evaluations and arrays must be, to the last bit.
"""

import argparse
import collections
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = ""
# The undisturbed run compiles everything, and the others read it: this is about kills, not about the compiler.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kills-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import train
from tests.histories import SETTINGS, events, numbers, stored, text
from vishwamai_eqx import checkpoint, manifest
from vishwamai_eqx.version import code_version

STEPS, A_HISTORY = 48, 6
OWN = ["--optim.batch-size=4", "--model.num-layers=1", "--checkpoint.every=3", "--checkpoint.keep=2", "--eval.every=16"]
CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "truncate")


class Attempt:
    """Some work in a copy of this process, which has imported everything and computed nothing yet."""

    def __init__(self, log: Path, work: Callable[[], int]):
        self.code: int | None = None
        if (child := os.fork()) != 0:
            self.number = child
            return
        code = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for stream in (1, 2):
                os.dup2(out, stream)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self, options: int = os.WNOHANG) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if self.code is None and (ended := os.waitpid(self.number, options))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code

    def wait(self) -> int | None:
        return self.poll(0)


def arm(kind: str, count: int) -> None:
    """Have this process kill itself at the count-th change, change of a delete, or row."""
    left, deleting, turn = [count], threading.local(), threading.Lock()

    def spent() -> bool:
        with turn:
            left[0] -= 1
            return left[0] == 0

    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()

    def change(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **settings: Any) -> Any:
            if (kind == "change" or getattr(deleting, "now", False)) and spent():
                end()
            return real(*arguments, **settings)

        return operation

    def delete(folder: Path, *, real: Callable[[Path], None] = manifest.delete) -> None:
        deleting.now = folder.is_dir()
        real(folder)
        deleting.now = False

    def write(file: int, data: bytes, *, real: Callable[[int, bytes], int] = os.write) -> int:
        if threading.current_thread().name == "logbook" and spent():
            real(file, data[: len(data) // 2])
            end()
        return real(file, data)

    if kind in ("change", "delete"):
        for name in CHANGES:
            setattr(os, name, change(getattr(os, name)))
        manifest.delete = delete
    elif kind == "row":
        os.write = write


def start(run_dir: Path, corpus: str, kind: str = "", count: int = 0) -> Attempt:
    def work() -> int:
        os.environ["VISHWAMAI_CACHE"] = f"{run_dir}-cache"
        arm(kind, count)
        arguments = ["--run-dir", str(run_dir), "--data", corpus, f"--steps={STEPS}", *SETTINGS, *OWN]
        return train.main(arguments, time.perf_counter())

    return Attempt(run_dir.with_suffix(".log"), work)


def rows(run_dir: Path) -> int:
    """Lines that this attempt and all before it have written."""
    return sum(path.read_bytes().count(b"\n") for path in (run_dir / "metrics").glob("attempt-*"))


def kill(run_dir: Path, corpus: str, chance: random.Random) -> dict[str, Any]:
    """An attempt and its end: how it was to be killed, the exit code, and what it left behind."""
    kind = chance.choice(["time", "change", "delete", "row"])
    most = {"time": 30, "change": 200, "delete": 40, "row": 30}[kind]
    # Early moments are as likely as late ones.
    count = round(most ** chance.random())
    signals = chance.choice([["SIGKILL"], ["SIGKILL"], ["SIGTERM"], ["SIGTERM", "SIGKILL"]]) if kind == "time" else []
    before, left = rows(run_dir), left_behind(run_dir)
    running = start(run_dir, corpus, kind, count)
    while signals and running.poll() is None and rows(run_dir) < before + count:
        time.sleep(0.002)
    for name in signals:
        time.sleep(chance.uniform(0, 0.08))
        if running.poll() is None:
            os.kill(running.number, signal.Signals[name])
    code = running.wait()
    new = sorted({what for what, _ in left_behind(run_dir) - left})
    return {"kind": kind, "count": count, "signals": signals, "code": code, "left": new}


def left_behind(run_dir: Path) -> set[tuple[str, str]]:
    """What ends came in the midst of, as far as one can see it afterwards, and where."""
    found = set() if (run_dir / "config.json").exists() else {("before the run began", "")}
    for path in (run_dir / "checkpoints").glob("[0-9]*"):
        if path.name.removesuffix(".deleted.tmp").isdecimal():
            if path.suffix or not (path / manifest.NAME).exists():
                found.add(("half a delete", path.name.split(".")[0]))
        elif path.suffix == ".tmp":
            found.add(("half a save", path.name.split(".")[0]))
    for path in (run_dir / "metrics").glob("attempt-*"):
        if (content := path.read_bytes()) and not content.endswith(b"\n"):
            found.add(("a torn row", path.name))
    return found


def wrong(run_dir: Path, undisturbed: Path, *, ended: bool) -> list[str]:
    """What of a run is not as in the run that nobody killed."""
    found = []
    saved = checkpoint.steps(run_dir / "checkpoints")
    for step in saved:
        damage = manifest.damage(run_dir / "checkpoints" / str(step))
        # Of an older one the delete may have begun: it takes the manifest first.
        if damage is not None and (step == max(saved) or damage != f"{manifest.NAME} is missing"):
            found.append(f"checkpoint {step}: {damage}")
    if not rows(run_dir):
        return found
    # A killed run has the first of the rows.
    for ours, theirs, name in zip(numbers(run_dir), numbers(undisturbed), ("steps", "evals"), strict=True):
        if repr(ours) != repr(theirs[: None if ended else len(ours)]):
            found.append(f"{name} are {ours} and should be {theirs}")
    if "checkpoint_damaged" in {kind for kind, _, _ in events(run_dir)}:
        found.append("a kill looked like damage")
    if ended and not found:
        ours, theirs = stored(run_dir, STEPS), stored(undisturbed, STEPS)
        found += [f"{name} differs" for name in theirs if ours[name].tobytes() != theirs[name].tobytes()]
    return found


def judged(run_dir: Path, undisturbed: Path, *, ended: bool) -> list[str]:
    """`wrong`, by a process of its own: DuckDB and jax start threads, and what has threads should not be copied."""
    answer = run_dir.with_suffix(".json")

    def work() -> int:
        answer.write_text(json.dumps(wrong(run_dir, undisturbed, ended=ended)))
        return 0

    if Attempt(run_dir.with_suffix(".log"), work).wait() != 0:
        raise RuntimeError(run_dir.with_suffix(".log").read_text())
    return json.loads(answer.read_text())


def check_itself(undisturbed: Path) -> None:
    """A digit of a loss and a bit of a weight are changed, and must be seen, or finding nothing wrong says nothing."""
    planted = undisturbed.with_name("planted")
    for plant in (plant_a_digit, plant_a_bit):
        shutil.copytree(undisturbed, planted)
        plant(planted)
        if not judged(planted, undisturbed, ended=True):
            raise RuntimeError(f"{plant.__name__}: it was not seen")
        shutil.rmtree(planted)


def plant_a_digit(run_dir: Path) -> None:
    for path in (run_dir / "metrics").glob("attempt-*"):
        row = re.compile(r'("step": 7, "loss": [\d.]*)(\d),')
        path.write_text(row.sub(lambda found: f"{found[1]}{(int(found[2]) + 1) % 10},", path.read_text()))


def plant_a_bit(run_dir: Path) -> None:
    """With a checksum that is right."""
    folder = run_dir / "checkpoints" / str(STEPS)
    about, files = manifest.read(folder), manifest.files(folder)
    path = max((folder / name for name in files), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    manifest.write(
        folder, manifest.checksums(folder, files), **{name: value for name, value in about.items() if name != "files"}
    )


def history(folder: Path, corpus: str, undisturbed: Path, seed: int, number: int) -> dict[str, Any]:
    """A run that is killed until it has been killed often enough, or was quicker, and then left alone."""
    chance, run_dir = random.Random(f"{seed}-{number}"), folder / f"history-{number}"
    kills, problems = [], []
    while len(kills) < A_HISTORY and (not kills or kills[-1]["code"] != 0):
        kills.append(kill(run_dir, corpus, chance))
        if kills[-1]["code"] not in (0, 143, -signal.SIGKILL):
            problems.append(f"attempt {len(kills)} ended with {kills[-1]['code']}")
        problems += judged(run_dir, undisturbed, ended=False)
    if (code := start(run_dir, corpus).wait()) != 0:
        problems.append(f"the last attempt ended with {code}")
    problems += judged(run_dir, undisturbed, ended=True)
    if problems:
        problems.append(run_dir.with_suffix(".log").read_text()[-4000:])
    else:
        shutil.rmtree(run_dir)
    return {"history": number, "kills": [one for one in kills if one["code"] != 0], "wrong": problems}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--history", type=int, help="this one alone")
    parser.add_argument("--minutes", type=float, default=30.0, help="no history begins later")
    parser.add_argument("--directory", type=Path, help="where the runs lie, and stay")
    parser.add_argument("--output", type=Path, help="a file to append the result to")
    options = parser.parse_args()
    began, folder = time.monotonic(), options.directory or Path(tempfile.mkdtemp(prefix="kills-"))
    (folder / "corpus").mkdir(parents=True)
    corpus, undisturbed = text(folder / "corpus"), folder / "undisturbed"
    if start(undisturbed, corpus).wait() != 0:
        raise RuntimeError(undisturbed.with_suffix(".log").read_text())
    check_itself(undisturbed)
    histories: list[dict[str, Any]] = []
    for number in itertools.count() if options.history is None else [options.history]:
        if sum(len(one["kills"]) for one in histories) >= options.kills:
            break
        if time.monotonic() - began > 60 * options.minutes:
            break
        histories.append(history(folder, corpus, undisturbed, options.seed, number))
        print(json.dumps(histories[-1]), file=sys.stderr, flush=True)
    every = [one for each in histories for one in each["kills"]]
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "code": code_version(),
        "seed": options.seed,
        "histories": len(histories),
        "kills": len(every),
        "wrong": [problem for each in histories for problem in each["wrong"]],
        "by_kind": dict(collections.Counter(" and ".join([one["kind"], *one["signals"]]) for one in every)),
        "left_behind": dict(collections.Counter(", ".join(one["left"]) or "nothing" for one in every)),
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(result, indent=1))
    if options.output is not None:
        known = json.loads(options.output.read_text()) if options.output.exists() else []
        options.output.write_text(json.dumps([*known, result], indent=1) + "\n")
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if result["wrong"]:
        print(f"the runs are in {folder}", file=sys.stderr)
    elif options.directory is None:
        shutil.rmtree(folder)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
