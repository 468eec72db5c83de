"""What asks a run to stop, signals and the notice that a pod is about to be taken away; and whose fault an error is."""

import os
import signal
import sys
import threading
from types import TracebackType


class Signals:
    """SIGTERM and SIGINT as a flag for the loop to look at: the first one asks to stop, a second one exits at once.

        with Signals() as signals:
            for step in ...:
                ...
                if signals.stop(step): save, wait for the save, sys.exit(signals.exit_code)

    A thread reads the signals, through the pipe that the interpreter's C handler writes to. Python's own handlers run
    in the main thread between two byte codes, so never while that thread compiles or waits for a device that hangs,
    which is when a second Ctrl-C matters. Only the main thread may enter; leaving restores what was there before.

    **Arguments**

    - `processes`: how many run this training together; a signal to one of them stops them all, at the same step.
    - `waits`: whether the first signal waits for the loop. While it does not, there is nothing to save, and the first
      signal exits at once: what text was read or compiled until then is in caches that go on where a killed process
      stopped. It may be set at any time.
    """

    def __init__(self, processes: int = 1, *, waits: bool = True) -> None:
        self.received: signal.Signals | None = None
        self.processes, self.waits = processes, waits

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after SIGINT, as a shell reports them; 0 if there was no signal."""
        return 128 + self.received if self.received else 0

    def stop(self, step: int) -> bool:
        """Whether to stop after `step`: the same answer in every process, each of which must ask at every step.

        Between processes the question waits for the devices, so it is one for every eighth step only. A notice of
        preemption from the scheduler of a pod asks to stop as SIGTERM does, at whatever step it names to all.
        """
        if self.processes > 1:
            # Of all that is here this alone needs jax.
            import jax
            import numpy as np
            from jax.experimental import multihost_utils

            service: bool = jax.config.jax_enable_preemption_service  # pyright: ignore[reportAttributeAccessIssue]
            if service and multihost_utils.reached_preemption_sync_point(step):
                self.received = self.received or signal.SIGTERM
                return True
            if step % 8:
                return False
            numbers = multihost_utils.process_allgather(np.array(self.received or 0, np.int32))
            self.received = signal.Signals(int(numbers.max())) if numbers.any() else None
        return self.received is not None

    def __enter__(self) -> "Signals":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # A handler in Python must be set for the C handler to be: it has nothing left to do.
        self._before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        while data := os.read(self._read, 64):
            for number in data:
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                name = signal.Signals(number).name
                if self.received is not None or not self.waits:
                    how = (
                        f"{name} again: exiting at once, nothing more is saved" if self.received else f"{name}: exiting"
                    )
                    # A progress bar has hidden the cursor, and nobody is left to show it again.
                    print(("\x1b[?25h" if sys.stderr.isatty() else "") + how, file=sys.stderr, flush=True)
                    os._exit(128 + number)
                self.received = signal.Signals(number)
                print(f"{name}: saving, then exiting; once more exits at once", file=sys.stderr, flush=True)


class Refusals:
    """What a ValueError means: until `end` that something of the user's is refused, from then on that a run failed.

    with Refusals() as refusals:
        ...  # open, restore
        refusals.end()
        ...  # a ValueError leaves as a RuntimeError, which no one takes for a refusal
    """

    def __init__(self) -> None:
        self._ended = False

    def end(self) -> None:
        """Say that all that can be refused has been looked at."""
        self._ended = True

    def __enter__(self) -> "Refusals":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ended and isinstance(error, ValueError):
            raise RuntimeError(f"the run failed: {error}") from error
