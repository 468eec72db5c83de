"""A small state, and a directory of its checkpoints for tests to break."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vishwamai_eqx.checkpoint import Checkpoints


def state(seed: int):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    weight = jax.device_put(np.random.default_rng(seed).normal(size=(8, 16)), NamedSharding(mesh, P("data")))
    return {"model": {"weight": weight}, "opt_state": (weight * 2,), "step": jnp.int32(seed)}


def same(left, right) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, left, right))


@dataclasses.dataclass
class Victim:
    """A directory with good checkpoints 1 and 2, to be damaged and opened again as a new process would."""

    directory: Path
    events: list[tuple[str, int, str]]

    def restore(self):
        with Checkpoints(self.directory, on_event=lambda kind, text, step: self.events.append((kind, step, text))) as c:
            return c.restore(state(0))

    def files(self, step: int) -> list[Path]:
        return sorted(path for path in (self.directory / str(step)).rglob("*") if path.is_file())
