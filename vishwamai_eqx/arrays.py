"""A state as arrays by name: what of it Orbax writes and reads, and what has to be as it was saved.

The name of an array is its path in the state, `model/blocks/attention/query/weight`, which says nothing of classes: a
part of a state finds its arrays in what the whole was saved as. Nothing but arrays is stored, and nothing is pickled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from vishwamai_eqx import manifest

State = TypeVar("State")


def checkpointer() -> ocp.AsyncCheckpointer:
    """Orbax's writer and reader."""
    # Weights hardly compress: 7% for several times the processor time.
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))


def by_name(state: PyTree) -> dict[str, Any]:
    """The arrays of a state by their path, which is the name they are stored under."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, (bool, int, float, complex, np.ndarray, np.generic)):
            raise ValueError(f"{name}={leaf!r} must be a jax array to be saved, or a static field to be left out")
        if _is_array(leaf):
            leaves[name] = leaf
    return leaves


def assemble(abstract: State, arrays: Mapping[str, jax.Array]) -> State:
    """A state like `abstract` with these arrays, in the order of `by_name`; what is no array is taken over."""
    dynamic, static = eqx.partition(abstract, _is_array)
    treedef = jax.tree.structure(dynamic)
    return eqx.combine(jax.tree.unflatten(treedef, list(arrays.values())), static)


def describe(name: str, leaf: Any) -> dict[str, Any]:
    """What a manifest says of an array."""
    return {"path": name, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def compare(folder: Path, about: Mapping[str, Any], wanted: Mapping[str, Any], *, whole: bool) -> None:
    """Raise ValueError unless every leaf is as it was saved: Orbax would cast another type and say nothing."""
    saved = {leaf["path"]: f"{leaf['dtype']}{leaf['shape']}" for leaf in about["leaves"]}
    here = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in wanted.items()}
    names = [*here, *(name for name in saved if whole and name not in here)]
    wrong = [
        f"{name} is {saved.get(name, 'absent')} in the checkpoint and {here.get(name, 'absent')} here"
        for name in names
        if saved.get(name) != here.get(name)
    ]
    if wrong:
        more = f" ({len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(
            f"{folder} is of another model or optimiser: {'; '.join(wrong[:3])}{more}; use the settings that it was "
            f"saved with, which are in its {manifest.NAME}, or another run directory"
        )


def restore(orbax: ocp.AsyncCheckpointer, folder: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays of those names, each placed as `wanted` says, on the first device where it says nothing.

    Raises ValueError where files whose checksums are right are none of a state.
    """
    single = SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or single)
        for name, leaf in wanted.items()
    }
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    try:
        restored = orbax.restore(
            folder / "state", args=ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=True)
        )
        arrays = {name: restored[name] for name in wanted}
        # Of what is not there Orbax gives back the wish.
        if absent := [name for name, array in arrays.items() if not isinstance(array, jax.Array)]:
            raise KeyError(absent[0])
        return arrays
    except (OSError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # the machine's, not the files'
    except Exception as error:
        # Orbax raises whatever it stumbles over. Not what damage is, so it is not put aside for an older step.
        raise ValueError(
            f"{folder}/state holds no state although its files are as they were written ({type(error).__name__}: "
            f"{error}); move {folder} away to go on from the checkpoint before it"
        ) from error
