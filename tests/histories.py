"""A small text, the settings of a run that is over in seconds, and what such a run computed."""

import random
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vishwamai_eqx import manifest
from vishwamai_eqx.checkpoint import read
from vishwamai_eqx.logbook import connect

# Every part is on; a step takes milliseconds.
SETTINGS = [
    "--optim.warmup-steps=2",
    "--eval.every=20",
    "--eval.rows=8",
    "--eval.sample-every=1000",
    "--eval.samples=2",
    "--eval.sample-tokens=8",
    "--precision=f32",
    "--model.vocab-size=400",
    "--model.hidden-size=32",
    "--model.num-layers=2",
    "--model.num-heads=2",
    "--model.num-kv-heads=1",
    "--model.num-experts=2",
    "--model.ffn-dim=32",
    "--model.max-seq-len=64",
    "--model.scan-unroll=1",
]


def text(folder: Path) -> str:
    """The glob of some files of words that are none."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 6))) for _ in range(300)]
    for number in range(40):
        lines = [" ".join(chance.choices(words, k=9)) for _ in range(60)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return str(folder / "*.txt")


def numbers(run_dir: Path) -> tuple[list[Any], list[Any]]:
    """What the run computed at each step and evaluation: everything but times and rates."""
    with connect(run_dir) as connection:
        return (
            connection.execute("SELECT step, loss, grad_norm, learning_rate, tokens, batch_hash FROM steps").fetchall(),
            connection.execute("SELECT step, loss, bits_per_byte FROM evals").fetchall(),
        )


def events(run_dir: Path) -> list[tuple[str, int, str]]:
    """Kind, step and message of each event."""
    with connect(run_dir) as connection:
        return connection.execute("SELECT kind, step, message FROM events").fetchall()


def stored(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by name."""
    leaves = manifest.read(run_dir / "checkpoints" / str(step))["leaves"]
    abstract = {leaf["path"]: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"]) for leaf in leaves}
    return jax.device_get(read(run_dir / "checkpoints", abstract, step=step))
