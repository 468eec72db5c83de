"""What it costs to be able to come back: a row of metrics, the loop's share of a save, checksums, readers.

    python -m tests.benchmarks.recovery_costs [--parameters 8e6] [--readers 10]

Prints one JSON object. The state is that many f32 parameters with AdamW's two moments; the step is a matrix product on
all cores, timed in turns with and without the readers, because a machine's speed drifts. Where it drifts by more than
the readers cost, `readers_share` says what they can cost at most: their processor time, of that of all cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from vishwamai_eqx import manifest
from vishwamai_eqx.checkpoint import Checkpoints
from vishwamai_eqx.logbook import Logbook

READER = """
import duckdb, sys, time
connection = duckdb.connect(sys.argv[1], read_only=True, config={"threads": 1})
began, polls = time.process_time(), 0
while True:
    connection.execute("SELECT step, loss FROM steps ORDER BY step DESC LIMIT 100").fetchall()
    polls += 1
    print((time.process_time() - began) / polls, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def timed(function, count):
    times = []
    for _ in range(count):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=8e6)
    parser.add_argument("--readers", type=int, default=10)
    parser.add_argument("--poll-seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=100, help="of each half of a round")
    options = parser.parse_args()
    run_dir = Path(tempfile.mkdtemp())
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.999, tree), donate_argnums=0)
    product = jax.jit(lambda x: x @ x / 1500)
    square = jnp.ones((1500, 1500))
    side = int((options.parameters / 16) ** 0.5)
    state = [jnp.full((side, side), float(i)) for i in range(48)]
    found: dict[str, float] = {"state_bytes": sum(leaf.nbytes for leaf in state)}

    with Logbook(run_dir, 0) as log, Checkpoints(run_dir / "checkpoints") as checkpoints:
        number = iter(range(1, 10**9))

        def row():
            log.step(step=next(number), loss=1.0, grad_norm=1.0, learning_rate=1e-3, tokens=4096, batch_hash="0" * 16)

        rows = []
        for _ in range(500):
            rows += timed(row, 1)
            time.sleep(1e-3)
        found["row_seconds"] = statistics.median(rows)
        blocked, whole = [], []
        for step in range(1, 6):
            state = jax.block_until_ready(update(state))
            began = time.perf_counter()
            checkpoints.save(step, state)
            blocked.append(time.perf_counter() - began)
            checkpoints.wait()
            whole.append(time.perf_counter() - began)
        found |= {"save_blocks_first_seconds": blocked[0], "save_blocks_seconds": statistics.median(blocked[1:])}
        found["save_seconds"] = statistics.median(whole[1:])
        folder = run_dir / "checkpoints" / "5"
        sums = statistics.median(timed(lambda: manifest.checksums(folder, manifest.files(folder)), 5))
        found |= {"checksum_seconds": sums, "checksum_bytes_per_second": found["state_bytes"] / sums}

        def step():
            jax.block_until_ready(product(square))
            row()

        ratios, polls = [], []
        for _ in range(options.rounds):
            alone = timed(step, options.steps)
            command = [sys.executable, "-c", READER, run_dir / "metrics.duckdb", str(options.poll_seconds)]
            readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(options.readers)]
            time.sleep(5)
            watched = timed(step, options.steps)
            # Means: what readers cost comes in bursts, which a median would leave out.
            ratios.append(statistics.mean(watched) / statistics.mean(alone))
            for reader in readers:
                reader.kill()
                said, _ = reader.communicate()
                polls.append(float(said.split()[-1]))
        found |= {"step_seconds": statistics.median(alone), "step_ratio_with_readers": statistics.median(ratios)}
        found["poll_seconds_of_cpu"] = statistics.median(polls)
        cores = os.cpu_count() or 1
        found["readers_share"] = options.readers * found["poll_seconds_of_cpu"] / options.poll_seconds / cores
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))


if __name__ == "__main__":
    main()
