"""What it costs that a step is written for a mesh: on one device, and in two processes instead of one.

    python -m tests.benchmarks.meshes [--rounds 15] [--steps 10]

Prints one JSON object of ratios. `shard_map` is a step of preset tiny on a mesh of one device over the same step
without `shard_map`. `two_processes` is a step over two devices in two processes, which talk over loopback, over the
same step over two devices of one process. Both sides take turns, and a ratio is that of the medians.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding

import train
from vishwamai_eqx import optim, state
from vishwamai_eqx.config import PRESETS
from vishwamai_eqx.data import Batch
from vishwamai_eqx.mesh import make_mesh
from vishwamai_eqx.precision import compute_dtype

SAID = "seconds: "


def stepper(devices: int) -> Callable[[int], float]:
    """A call that runs so many steps of preset tiny over the devices, and says how many seconds they took."""
    config = PRESETS["tiny"]
    on, transform, dtype = make_mesh({"data": devices}), optim.optimizer(config.optim), compute_dtype("auto")
    shapes = state.abstract_state(config, dtype, transform)
    specs = state.placement(shapes, dict(on.shape), transform)
    current = state.initialise(config, dtype, transform, state.shardings(on, specs))
    rows = np.random.default_rng(0).integers(
        4, config.model.vocab_size, (1, config.optim.batch_size, config.model.max_seq_len), np.int32
    )
    ones, places = np.ones_like(rows), np.broadcast_to(np.arange(rows.shape[-1], dtype=np.int32), rows.shape)
    batch = jax.device_put(Batch(rows, np.roll(rows, -1), ones, places), NamedSharding(on, train.MICROBATCHES))
    step = train.make_step(config, on, specs, transform)

    def run(steps: int) -> float:
        nonlocal current
        began = time.perf_counter()
        for _ in range(steps):
            current, metrics = step(current, batch)
        jax.block_until_ready((current, metrics))
        return time.perf_counter() - began

    return run


def worker(count: int, index: int, address: str) -> None:
    """One of so many processes that have two devices together: for each line it is sent it runs so many steps."""
    if count > 1:
        jax.distributed.initialize(address, count, index)
    run = stepper(2)
    for line in sys.stdin:
        print(f"{SAID}{run(int(line))}", flush=True)


def processes(count: int) -> Callable[[int], float]:
    """A call that runs so many steps in that many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={2 // count}"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.meshes", "--worker", str(count), str(index), address],
            cwd=Path(train.__file__).parent,
            env={**os.environ, "XLA_FLAGS": flags},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]

    def run(steps: int) -> float:
        for process in started:
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        # The library that carries the messages prints lines of its own.
        lines = [next(line for line in process.stdout if line.startswith(SAID)) for process in started]
        return max(float(line.removeprefix(SAID)) for line in lines)

    return run


def compare(sides: dict[str, Callable[[int], float]], rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of a step of each side; the first round, which compiles, does not count."""
    times = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            seconds = run(steps) / steps
            times[name] += [seconds] * (turn > 0)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="of each side in a round")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        count, index, address = options.worker
        worker(int(count), int(index), address)
        return
    sharded = stepper(1)
    with mock.patch.object(jax, "shard_map", lambda step, **_: step):
        plain = stepper(1)
        plain(1)  # traced here, without shard_map
    one = compare({"plain": plain, "shard_map": sharded}, options.rounds, options.steps)
    two = compare({"one": processes(1), "two": processes(2)}, options.rounds, options.steps)
    ratios = {"shard_map": one["shard_map"] / one["plain"], "two_processes": two["two"] / two["one"]}
    print(json.dumps({"jax": jax.__version__, **ratios, "seconds": one | two}))


if __name__ == "__main__":
    main()
