"""Where a run's time and memory go."""

import time
from pathlib import Path

import jax

from vishwamai_eqx import logbook

# How the summary calls the spans of the logbook.
_NAMES = {
    "step": "steps",
    "start": "start-up",
    "compile": "compilation",
    "data": "waiting for data",
    "eval": "evaluation and samples",
    "save": "saves",
    "repeated": "steps that a restart did again",
}


class Clock:
    """Divides time among what it is spent on: each lap begins where the one before ended, so none is left out."""

    def __init__(self, since: float):
        """`since` is a time of `time.perf_counter`, at which the first lap begins."""
        self._since = since

    def lap(self) -> float:
        """Seconds since the last lap."""
        since, self._since = self._since, time.perf_counter()
        return self._since - since


def goodput(run_dir: Path) -> str:
    """A line for people: the share of the run's time, over all its attempts, that went into steps that count."""
    with logbook.connect(run_dir) as connection:
        rows = connection.execute("SELECT name, seconds, share FROM goodput").fetchall()
    shares = {name: share for name, _, share in rows}
    rest = ", ".join(f"{_NAMES.get(name, name)} {share:.1%}" for name, _, share in rows if name != "step")
    total = sum(seconds for _, seconds, _ in rows)
    return f"goodput: {shares.get('step', 0.0):.1%} of {total:,.0f} s in steps; {rest}"


def memory() -> dict[str, int]:
    """Bytes in use by this process: `host`, and each of its devices that keeps count."""
    # The second field is the pages that are resident.
    status = Path("/proc/self/statm")
    found = {"host": int(status.read_text().split()[1]) * 4096} if status.exists() else {}
    for device in jax.local_devices():
        if statistics := device.memory_stats():
            found[f"{device.platform} {device.id}"] = statistics["bytes_in_use"]
    return found


def capacity() -> int | None:
    """Bytes of memory that the program may use of a device, where the device says so, as a CPU does not."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
