"""Devices by axis, where each parameter lies, and the gather of what a layer needs.

`data` divides the batch, and with it parameters, gradients and optimiser state (2004.13336, 1910.02054): every device
holds a slice of each large array and sees all of it only while a layer computes. One device is the mesh of one.
"""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from vishwamai_eqx.config import AXES
from vishwamai_eqx.parameters import declarations

P = PartitionSpec
Tree = TypeVar("Tree")


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """The mesh of those sizes over the first devices there are."""
    devices = np.array(jax.devices()[: int(np.prod(list(sizes.values())))])
    return Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def place(model: Tree, sizes: dict[str, int]) -> Tree:
    """A tree like `model` of the PartitionSpec of each parameter.

    The first dimension that 128 times the axis divides is sharded, so that every shard holds whole tiles and whole
    blocks of FP8 scales; failing that the first that the axis divides; failing that the array is on every device.
    """
    data = sizes["data"]

    def spec(leaf: Any, axes: tuple[str, ...]) -> PartitionSpec:
        candidates = [i for i, axis in enumerate(axes) if axis != "layers"]
        for unit in (128 * data, data):
            for i in candidates:
                # Vectors are too small to be worth a collective each.
                if len(candidates) > 1 and leaf.shape[i] % unit == 0:
                    return P(*(None,) * i, "data")
        return P()

    return jax.tree.map(lambda leaf, declared: spec(leaf, declared.axes), model, declarations(model))


def gather(shards: Tree, placement: Any, dtype: Any) -> Tree:
    """All of each array, cast to `dtype` before it crosses the wire; arrays declared without cast stay as they are.

    Inside `shard_map`. What every device holds already becomes a copy of its own (`pcast`), whose gradient is summed
    over the devices by the transpose, as the gradient of a gather is scattered by its own. With no placement, outside
    `shard_map`, only the cast happens.
    """

    def whole(shard: Any, declared: Any, spec: PartitionSpec | None) -> Any:
        if declared.cast:
            shard = shard.astype(dtype)
        if spec is None:
            return shard
        for axis, name in enumerate(spec):
            if name is not None:
                return jax.lax.all_gather(shard, name, axis=axis, tiled=True)
        return jax.lax.pcast(shard, AXES, to="varying")

    declared = declarations(shards)
    if placement is None:
        return jax.tree.map(lambda shard, declared: whole(shard, declared, None), shards, declared)
    return jax.tree.map(whole, shards, declared, placement)
