"""Several processes that are one run: how they find each other, agree, and end when one of them does.

Each of them is started with the same command, on a pod one a host. All compute; process 0 alone writes what a run has
one of, and speaks.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vishwamai_eqx.config import ProcessesConfig

AUTO = "auto"
# How long the first process waits for the last one. What a scheduler starts together is there together.
_START_SECONDS = 300


def problems(config: ProcessesConfig) -> list[str]:
    """A sentence for each setting with which no processes find each other."""
    given = {name: getattr(config, name) for name in ("count", "index")}
    if config.address in (None, AUTO):
        why, fix = "with processes.address=auto, which finds it", "leave it out"
        if config.address is None:
            why, fix = "without processes.address", "give it HOST:PORT, or auto"
        return [
            f"processes.{name}={value} means nothing {why}; {fix}."
            for name, value in given.items()
            if value is not None
        ]
    found = []
    host, _, port = config.address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        found.append(
            f"processes.address={config.address!r} must be HOST:PORT, where process 0 listens, or auto on a TPU pod or "
            "under Slurm; take 127.0.0.1:8476 for processes of one machine."
        )
    for name, meaning in (("count", "how many there are"), ("index", "which of them this is, from 0")):
        if given[name] is None:
            found.append(f"processes.{name} must be given with processes.address={config.address!r}: {meaning}.")
    if config.count is not None and config.count < 1:
        found.append(f"processes.count={config.count} must be at least 1; take 2.")
    elif config.index is not None and not 0 <= config.index < (config.count or 2**31):
        below = f" and below processes.count={config.count}" if config.count else ""
        found.append(f"processes.index={config.index} must be at least 0{below}; take 0 for the first.")
    return found


def join(config: ProcessesConfig) -> None:
    """Wait for the other processes, if there are to be any; before anything asks jax for its devices.

    **Raises** ValueError if they do not come.
    """
    if config.address is None or jax.distributed.is_initialized():
        return
    auto = config.address == AUTO
    try:
        jax.distributed.initialize(
            None if auto else config.address,
            config.count,
            config.index,
            initialization_timeout=_START_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"processes.address={config.address!r} must be where the processes of a run find each other, and "
            + (
                "there is no TPU pod and no Slurm job here to ask; take HOST:PORT, count and index."
                if auto
                else f"within {_START_SECONDS} s they did not; start all {config.count}, one with each index."
            )
            + f" ({_first_line(error)})"
        ) from None
    if not primary():
        # Of what all of them compute alike one tells.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def primary() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that every process does, and in which none waits for another: a refusal in one is one in all.

    What cannot be read or written is refused too. **Raises** ValueError in all of them with the sentence of the first
    that had one.
    """
    refusal = None
    try:
        yield
    except ValueError as error:
        if jax.process_count() == 1:
            raise
        refusal = str(error)
    except OSError as error:
        where = error.filename or "what a run reads and writes before it begins"
        refusal = f"{where}: {error.strerror or error}; mend that and start again"
    for number, theirs in enumerate(_tell(refusal or "")):
        if theirs:
            raise ValueError(refusal if theirs == refusal else f"process {number}: {theirs}")


def require_same(values: Mapping[str, Any]) -> None:
    """Refuse processes that do not have the same values, which are JSON-ready and may be nested.

    **Raises** ValueError, in all of them, with a sentence for each value that a process has otherwise than process 0.
    """
    first, *others = map(json.loads, _tell(json.dumps(values)))

    def differences(number: int, mine: Any, theirs: Any, name: str) -> Iterator[str]:
        if isinstance(mine, dict) and isinstance(theirs, dict):
            for key in mine:
                yield from differences(number, mine[key], theirs.get(key), f"{name}.{key}" if name else key)
        elif mine != theirs:
            yield f"{name}={theirs!r} of process {number} must be {mine!r}, as process 0 has it; start all alike."

    found = [line for number, other in enumerate(others, 1) for line in differences(number, first, other, "")]
    if found:
        raise ValueError("\n".join(found))


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """A block whose error ends its process at once: the exit codes are 2 for what is refused, 1 for all else.

    Of a process that is alone errors go where they always do. Otherwise nothing is unwound: what would be cleaned up on
    the way waits for the others. Those notice, as they do if this process is killed, when jax's heartbeats stay away
    for 100 seconds: then jax ends them too, and says why.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, ValueError):
            sentence, code = str(error), 2
        else:
            traceback.print_exc()
            lost = "another of its processes was lost, or a device failed"
            why = lost if isinstance(error, jax.errors.JaxRuntimeError) else "this process failed"
            this = f"process {jax.process_index()} of {jax.process_count()}"
            sentence = f"{this} stops, and the run with it: {why}; the same commands go on where it was saved last"
            code = 1
        print(sentence, file=sys.stderr, flush=True)
        os._exit(code)


def _tell(text: str) -> list[str]:
    """What each process has to say, by its number."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    words = np.pad(data, (0, int(sizes.max()) - len(data)))
    said = multihost_utils.process_allgather(words) if len(words) else np.zeros((len(sizes), 0), np.uint8)
    return [bytes(row[:size]).decode() for row, size in zip(said, sizes, strict=True)]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
