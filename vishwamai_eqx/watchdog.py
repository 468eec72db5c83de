"""A run that hangs says where: what each thread does and what the devices hold, written to the run directory."""

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import jax


class Watchdog:
    """Waits for steps; after too long without one, writes `RUN/hang-step-STEP-process-PROCESS.txt`.

        with Watchdog(run_dir, minutes=15.0, on_event=log.event) as watchdog:
            for step in ...:
                watchdog.step(step)

    It changes nothing of the run, which may only be slow; a later step makes it watch again.

    **Arguments**

    - `minutes`: how long is too long, compilation and evaluation included; 0: nothing is watched.
    - `on_event`: called as `on_event("hang", message, step=step)`, from a thread.
    """

    def __init__(self, run_dir: Path, *, minutes: float, on_event: Callable[..., None]):
        self.run_dir, self.seconds, self._on_event = run_dir, 60 * minutes, on_event
        self._last: tuple[int, float] = (0, time.monotonic())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def step(self, step: int) -> None:
        """Say that `step` is being done."""
        self._last = (step, time.monotonic())

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self._last = (self._last[0], time.monotonic())
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self.seconds:
            self._thread.join()

    def _watch(self) -> None:
        told = None
        while not self._ended.wait(min(self.seconds / 4, 10.0)):
            last = self._last
            if last is not told and time.monotonic() - last[1] > self.seconds:
                told = last
                self._tell(*last)

    def _tell(self, step: int, since: float) -> None:
        path = self.run_dir / f"hang-step-{step}-process-{jax.process_index()}.txt"
        message = f"no step for {time.monotonic() - since:.0f} s after step {step}"
        try:
            with open(path, "w") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n\n")
                file.flush()
                # By the descriptor, and first: the devices may not answer either.
                faulthandler.dump_traceback(file, all_threads=True)
                file.writelines(f"{line}\n" for line in ["", *device_state()])
        except OSError as error:
            message += f"; {path.name} could not be written: {error}"
        self._on_event("hang", f"{message}: see {path.name}", step=step)


def device_state() -> Iterator[str]:
    """Lines that say what this process's devices hold and what they have not finished."""
    for device in jax.local_devices():
        memory = device.memory_stats() or {}
        yield f"{device}: {device.device_kind}, " + (
            ", ".join(f"{name} {value:,}" for name, value in memory.items()) or "keeps no count of its memory"
        )
    count = size = 0
    unfinished = []
    for array in jax.live_arrays():
        try:
            ready = array.is_ready()
        except RuntimeError:  # deleted since it was listed
            continue
        count, size = count + 1, size + array.nbytes
        if not ready:
            unfinished.append(f"  {array.dtype}{list(array.shape)} on {len(array.sharding.device_set)} devices")
    yield f"{count} arrays of {size:,} bytes, of which {len(unfinished)} are not computed yet"
    yield from unfinished[:20]
