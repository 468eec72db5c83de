"""Devices by axis, where each parameter lies, and the gather of what a layer needs.

    replica   divides the batch: whole copies of everything else, for slices with slow wires between them
    data      divides the batch, and with it parameters, gradients and optimiser state (2004.13336, 1910.02054): a
              device holds a slice of each large array and sees all of it only while a layer computes
    expert    the same as data for all but the experts, which are placed on it and have tokens sent to them (2006.16668)
    model     divides heads, ffn and vocabulary; the residual stream is the same on all of its devices (1909.08053)

One device is the mesh of ones, and an axis of size one divides nothing: it is in no spec, nothing varies over it, and
no collective goes over it, which XLA on CPU would carry out as a copy. What varies over `model` is partial or a part,
and `sum_over` makes it whole. Outside `shard_map` the functions here take all axes to be of size one.
"""

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from kernels import Fp8, Meter, Meters, Quantized, fp8_weights
from kernels.compat import accumulator, varying_axes, zeros_varying_like
from kernels.gemm.fp8 import fp8_rounded
from vishwamai_eqx.config import AXES, BATCH_AXES, ScalingConfig
from vishwamai_eqx.parameters import Declaration, declarations, is_parameter

P = PartitionSpec
Tree = TypeVar("Tree")


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of those sizes over the first of the devices, or of those here; an axis not named has size one."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    chosen = np.array((jax.devices() if devices is None else devices)[: math.prod(shape)])
    return Mesh(chosen.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def size(*axes: str) -> int:
    """The devices along the axes."""
    return math.prod(jax.lax.axis_size(axis) for axis in bound(*axes))


def index(*axes: str) -> jax.Array | int:
    """Which of the devices along the axes this one is, the last axis the fastest."""
    return jax.lax.axis_index(bound(*axes)) if bound(*axes) else 0


def sum_over(x: Tree, *axes: str) -> Tree:
    """The sum over the devices along the axes."""
    return jax.lax.psum(x, bound(*axes)) if bound(*axes) else x


def max_over(x: Tree, *axes: str) -> Tree:
    """The largest over the devices along the axes."""
    return jax.lax.pmax(x, bound(*axes)) if bound(*axes) else x


def vary(x: jax.Array, *axes: str) -> jax.Array:
    """A copy for each device along the axes, whose gradients the transpose sums; what varies already stays."""
    missing = tuple(axis for axis in bound(*axes) if axis not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def bound(*axes: str) -> tuple[str, ...]:
    """Those of the axes that divide something here, inside `shard_map`."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in axes if axis in manual and jax.lax.axis_size(axis) > 1)


def on_mesh(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """The spec without the axes of size one."""
    return partition([tuple(axis for axis in axes_of(entry) if mesh.shape[axis] > 1) for entry in spec])


def place(model: Tree, sizes: dict[str, int]) -> Tree:
    """A tree like `model` of the PartitionSpec of each parameter, by the names and shapes that it is declared with.

    `model` divides the dimension that is declared for it, `expert` that of the experts. Of the dimensions the first one
    that 128 times `data` divides is sharded over it, so that every shard holds whole tiles and whole blocks of FP8
    scales; failing that the first that the axis divides; failing that the array is on every device. Outside the experts
    `expert` is used as a part of `data`.

    **Raises** ValueError where `expert` does not divide the experts, or `model` is neither a divisor nor a multiple
    of the parts.
    """
    dividing = {axis: n for axis, n in sizes.items() if n > 1}

    def spec(leaf: Any, declared: Declaration) -> PartitionSpec:
        over: list[tuple[str, ...]] = [()] * len(leaf.shape)
        left, shards = list(leaf.shape), [axis for axis in ("data", "expert") if axis in dividing]
        placed = experts_axis(declared)

        def lay(dimension: int, *axes: str) -> None:
            over[dimension] += axes
            left[dimension] //= math.prod(dividing[axis] for axis in axes)

        if placed is not None and "expert" in dividing:
            require("expert", dividing["expert"], leaf.shape[placed], "the experts")
            lay(placed, "expert")
            shards.remove("expert")
        if declared.split is not None and "model" in dividing:
            dimension, parts = declared.split
            if parts % dividing["model"] == 0:
                lay(dimension, "model")
            elif dividing["model"] % parts:
                require("model", dividing["model"], parts, f"the parts of {declared.axes[dimension]}")
        matrix = [i for i, axis in enumerate(declared.axes) if axis != "layers"]
        candidates = [i for i in matrix if declared.axes[i] != "experts"]
        pieces = math.prod(dividing[axis] for axis in shards)
        for unit in (128 * pieces, pieces) if shards else ():
            for i in candidates:
                # Vectors are too small to be worth a collective each.
                if len(matrix) > 1 and left[i] % unit == 0:
                    lay(i, *shards)
                    return partition(over)
        return partition(over)

    return jax.tree.map(spec, model, declarations(model))


def require(axis: str, devices: int, parts: int, what: str) -> None:
    """**Raises** ValueError unless the devices along the axis divide the parts."""
    if parts % devices:
        raise ValueError(f"mesh {axis}={devices} must divide {what}, which are {parts}; take another size.")


def partition(over: list[tuple[str, ...]]) -> PartitionSpec:
    """The spec with these axes by dimension, in its shortest form."""
    entries = [axes[0] if len(axes) == 1 else axes or None for axes in over]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def divided(spec: PartitionSpec) -> tuple[str, ...]:
    """The axes that divide what lies so, in the order of the mesh."""
    names = {name for entry in spec for name in axes_of(entry)}
    return tuple(axis for axis in AXES if axis in names)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes in an entry of a spec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def experts_axis(declared: Declaration) -> int | None:
    """The dimension of an expert's own parameters that counts the experts; a router's is no such."""
    axes = [axis for axis in declared.axes if axis != "layers"]
    return declared.axes.index("experts") if axes[0] == "experts" else None


def gather(shards: Tree, placement: Any, dtype: Any, *, fp8: ScalingConfig | None = None, meters: Any = None) -> Tree:
    """What a device computes with: all that `data` divides of each array, and its own part of what others divide.

    Inside `shard_map`. Arrays are cast to `dtype` before they cross the wire, those declared without cast stay as they
    are. Their gradients cross it in that type too, once, and are summed in f32 where they arrive. What every device
    holds already becomes a copy of its own, whose gradient is summed over the devices by the transpose. With no
    placement, outside `shard_map`, only the cast happens.

    With `fp8`, what is declared for it and not to be skipped is rounded to `dtype` and then to e4m3, and crosses the
    wire so where it has one scale or shards hold whole blocks: the numbers are those of one device. `meters`, a tree
    like the shards, say what earlier steps know of scales. What is held in 8 bits stays as it is.
    """

    def whole(path: Any, shard: Any, declared: Declaration, spec: Any, meters: Any) -> Any:
        if isinstance(shard, Quantized):
            return shard
        to, block = dtype if declared.cast else shard.dtype, None
        if fp8 is not None and not named(path, fp8.skip):
            block = declared.fp8
            if block is not None and fp8.fp8 != "block" and meters is None:
                meters = unknown()

        def rounded(x: jax.Array) -> Any:
            return x if block is None else fp8_weights(x, block, meters)

        if spec is None:
            return rounded(shard.astype(to))
        placed = experts_axis(declared)
        # Before the gather, so that what is summed over the other axes is the gradient of a shard. Heads that are fewer
        # than the devices along `model` are copied to all of them, each of which uses its own.
        shard = vary(shard, *BATCH_AXES, *(("model",) if declared.split else ()))
        for dimension, entry in enumerate(spec):
            names = tuple(
                name for name in axes_of(entry) if name == "data" or (name == "expert" and dimension != placed)
            )
            if names:
                if block is not None and (meters is not None or shard.shape[dimension] % block == 0):
                    sent: Any = gathered_fp8(shard, meters and meters.weights, dimension, names, to, block)
                    return sent._replace(meters=meters)
                return rounded(gathered(shard, dimension, names, to))
        return rounded(shard.astype(to))

    nothing = jax.tree.map(lambda _: None, shards, is_leaf=is_parameter)
    trees = declarations(shards), nothing if placement is None else placement, nothing if meters is None else meters
    return jax.tree_util.tree_map_with_path(whole, shards, *trees, is_leaf=is_parameter)


def named(path: tuple[Any, ...], names: Collection[str]) -> bool:
    """Whether what lies there in a tree, or a module that it is in, has one of the names."""
    return any(getattr(entry, "name", None) in names for entry in path)


def unknown() -> Meters:
    """Of a weight of which nothing is known from earlier steps: each tensor's scale is that of its own numbers."""
    here = Meter(None, jax.numpy.zeros(()), jax.numpy.zeros(()))
    return Meters(here, here, here)


def side_by_side(shard: jax.Array, dimension: int, axes: tuple[str, ...], dtype: Any) -> jax.Array:
    """The shards of all devices along the axes, side by side along the dimension."""
    return jax.lax.all_gather(shard.astype(dtype), axes, axis=dimension, tiled=True)


gathered = jax.custom_vjp(side_by_side, nondiff_argnums=(1, 2, 3))


def gathered_fwd(shard: jax.Array, dimension: int, axes: tuple[str, ...], dtype: Any) -> tuple[jax.Array, Any]:
    return side_by_side(shard, dimension, axes, dtype), jax.numpy.zeros((), shard.dtype)


def fp8_side_by_side(
    shard: jax.Array, meter: Meter | None, dimension: int, axes: tuple[str, ...], dtype: Any, block: int
) -> tuple[Fp8, Any]:
    """The same in e4m3 with scales, of shards that are whole blocks along the dimension or have one scale; and what is
    kept for the way back."""
    rounded, seen = fp8_rounded(shard.astype(dtype), meter, (block, block), False)
    # As bytes: not every backend can send what it cannot compute with.
    sent = jax.lax.bitcast_convert_type(rounded.values, jax.numpy.uint8)

    def gathered(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, axes, axis=dimension, tiled=True)

    values, scales = gathered(sent), rounded.scales
    if meter is None:
        scales = gathered(scales)
    else:
        # One for all; but where a device has what is no number, all shall see it.
        worst = jax.lax.pmax(jax.numpy.isnan(scales).astype(jax.numpy.int32), axes)
        scales = jax.numpy.where(worst > 0, jax.numpy.nan, scales)
    values = jax.lax.bitcast_convert_type(values, rounded.values.dtype)
    zeros = zeros_varying_like(values.shape, dtype, values)
    return Fp8(values, scales, zeros), (jax.numpy.zeros((), shard.dtype), seen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def gathered_fp8(
    shard: jax.Array, meter: Meter | None, dimension: int, axes: tuple[str, ...], dtype: Any, block: int
) -> Fp8:
    return fp8_side_by_side(shard, meter, dimension, axes, dtype, block)[0]


def gathered_fp8_bwd(
    dimension: int, axes: tuple[str, ...], dtype: Any, block: int, saved: Any, g: Fp8
) -> tuple[jax.Array, Meter | None]:
    like, seen = saved
    return *gathered_bwd(dimension, axes, dtype, like, g.gradient), seen


def gathered_bwd(dimension: int, axes: tuple[str, ...], dtype: Any, like: Any, g: jax.Array) -> tuple[jax.Array]:
    # Each device sends every other one its piece, which adds them up: the bytes of a reduce-scatter, of which XLA
    # makes an all-reduce of twice as many on v2 and v3, and sums in f32 whatever the type on the wire.
    pieces = jax.lax.axis_size(axes)
    g = g.reshape(*g.shape[:dimension], pieces, g.shape[dimension] // pieces, *g.shape[dimension + 1 :])
    g = jax.lax.all_to_all(g, axes, dimension, dimension, tiled=True)
    return (g.astype(accumulator(g.dtype)).sum(axis=dimension).astype(like.dtype),)


gathered.defvjp(gathered_fwd, gathered_bwd)
gathered_fp8.defvjp(fp8_side_by_side, gathered_fp8_bwd)
