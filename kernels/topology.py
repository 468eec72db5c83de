"""The TPU compiler on a machine without a TPU.

`libtpu` compiles for every generation on any x86-64 Linux machine: a topology describes devices that are not there, and
a program lowered for one of them compiles as it would beside it. Import this before anything uses a TPU.
"""

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Callable
from typing import Any

from kernels.tpu import GENERATIONS, Generation

# Read when libtpu is loaded: without them it looks for the metadata server of a cloud machine, which a real one has.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_MEGACORE = {"chip_config_name": "megacore"}  # two cores are one device, as they are used
# Generations as the compiler names them, by the names of the table.
_COMPILER_NAMES = {"7x": "tpu7x"}
_GENERATIONS = {_COMPILER_NAMES.get(name, name): it for name, it in GENERATIONS.items()}
# Eight devices of each generation.
_EIGHT = {"v2": "2x2", "v3": "2x2", "v4": "2x2x2", "v5e": "2x4", "v5p": "2x2x2", "v6e": "2x4", "7x": "2x2x1"}
EXAMPLES = tuple(f"{_COMPILER_NAMES.get(name, name)}:{shape}" for name, shape in _EIGHT.items())
"""A topology of each generation, as they are written."""


def parse(topology: str) -> tuple[Generation, tuple[int, ...]]:
    """The generation and the chips by axis of a NAME:SHAPE such as v3:2x2.

    **Raises** ValueError for a name that no generation has and a shape that no slice of it has.
    """
    name, _, text = topology.partition(":")
    if name not in _GENERATIONS:
        guess = next(iter(difflib.get_close_matches(name.lower(), _GENERATIONS, 1, 0.3)), "v3")
        example = next(it for it in EXAMPLES if it.startswith(f"{guess}:"))
        raise ValueError(
            f"topology={topology!r} must be NAME:SHAPE with a name of {', '.join(_GENERATIONS)}; take {example}."
        )
    generation = _GENERATIONS[name]
    axes, example = len(generation.pod), next(it for it in EXAMPLES if it.startswith(f"{name}:"))
    largest = "x".join(map(str, generation.pod))
    shape = tuple(int(n) for n in text.split("x")) if re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", text) else ()
    # Hosts hold two chips by two.
    fits = len(shape) == axes and not any(n % 2 for n in shape[:2])
    fits = fits and all(n <= most for n, most in zip(sorted(shape), sorted(generation.pod), strict=True))
    if not fits:
        raise ValueError(
            f"topology={topology!r} must have {'AxBxC' if axes == 3 else 'AxB'} chips, A and B even, of at most "
            f"{largest}; take {example}."
        )
    return generation, shape


def count(topology: str) -> int:
    """Devices of a topology, as jax counts them."""
    generation, shape = parse(topology)
    return math.prod(shape) * generation.devices


def devices(topology: str) -> list[Any]:
    """Descriptions of the topology's devices, for which programs can be compiled.

    **Raises** ValueError for a topology that there is not, or where the compiler is not installed.
    """
    generation, _ = parse(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology={topology!r} needs the TPU compiler, which is not installed here; "
            "pip install 'jax[tpu]' (x86-64 Linux, no TPU needed)."
        )
    # Programs run on both cores of a chip as one where the hardware can.
    options = _MEGACORE if generation.cores == 2 else {}
    return topologies.get_topology_desc(topology, platform="tpu", **options).devices


def mesh(generation: str, shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("data",)) -> Mesh:
    """A mesh of up to eight devices of the generation; programs compile for it, and nothing can run on it.

    **Raises** ValueError where the compiler is not installed.
    """
    found = devices(f"{_COMPILER_NAMES.get(generation, generation)}:{_EIGHT[generation]}")
    chosen = np.asarray(found[: int(np.prod(shape))]).reshape(shape)
    return Mesh(chosen, axes, axis_types=(AxisType.Auto,) * len(axes))


def lower_for(generation: str, fn: Callable[..., Any], *avals: Any, on: Mesh | None = None) -> jax.stages.Lowered:
    """Lower `fn` of pytrees of `jax.ShapeDtypeStruct` for the generation; then `.compile()` asks the compiler.

    What says nothing of its placement is replicated over `on`, by default one device.
    """
    devices = mesh(generation) if on is None else on
    replicated = NamedSharding(devices, PartitionSpec())

    def placed(aval):
        sharding = replicated if aval.sharding is None else aval.sharding
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)

    # Pallas asks the ambient mesh which TPU it lowers for.
    with jax.sharding.use_abstract_mesh(devices.abstract_mesh):
        return jax.jit(fn).trace(*jax.tree.map(placed, avals)).lower(lowering_platforms=("tpu",))
