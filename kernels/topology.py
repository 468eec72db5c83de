"""The TPU compiler on a machine without a TPU.

`libtpu` compiles for every generation on any x86-64 Linux machine: a topology describes devices that are not there, and
a program lowered for one of them compiles as it would beside it. Import this before anything uses a TPU.
"""

import os
from collections.abc import Callable
from typing import Any

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
# Eight devices of each generation, as the compiler names them.
_TOPOLOGIES: dict[str, tuple[str, dict[str, str]]] = {
    "v2": ("v2:2x2", {}),
    "v3": ("v3:2x2", {}),
    "v4": ("v4:2x2x2", _MEGACORE),
    "v5e": ("v5e:2x4", {}),
    "v5p": ("v5p:2x2x2", _MEGACORE),
    "v6e": ("v6e:2x4", {}),
    "7x": ("tpu7x:2x2x1", {}),
}


def mesh(generation: str, shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("data",)) -> Mesh:
    """A mesh of up to eight devices of the generation; programs compile for it, and nothing can run on it.

    **Raises** what the compiler's library raises where it is missing.
    """
    name, options = _TOPOLOGIES[generation]
    devices = topologies.get_topology_desc(name, platform="tpu", **options).devices
    chosen = np.asarray(devices[: int(np.prod(shape))]).reshape(shape)
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
