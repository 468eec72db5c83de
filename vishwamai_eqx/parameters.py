"""How a parameter is declared: its axes, whether weight decay applies, the type it is computed in.

A module's field says all of it in one place, and placement, decay and casts are read from there:

    weight: Float[Array, "d_model d_ff"] = parameter(decay=True)

The names of the axes are those of the field's annotation. Stacked layers have one axis more, in front.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from kernels import Quantized


@dataclass(frozen=True)
class Declaration:
    """What a field says of its parameter."""

    axes: tuple[str, ...]
    decay: bool
    cast: bool
    """Whether it is cast to the compute type before use; what is not stays f32."""
    split: tuple[int, int] | None
    """The dimension that the mesh's `model` axis divides, and the parts that it may be divided into."""
    fp8: int | None
    """The side of the squares that share a scale where it is computed in fp8; None where it never is."""


def parameter(
    *, decay: bool, cast: bool = True, split: str | Callable[[Any], tuple[int, int] | None] = "", fp8: bool = False
) -> Any:
    """A field that holds a parameter: matrices decay and are cast, gains, biases and routers say otherwise.

    `split` is the axis that the mesh's `model` divides, or a function of the module that gives the axis' index and the
    number of parts, such as heads, that have to stay whole. With `fp8` the module's `use_fp8` permits that, in blocks
    of its `block_size`.
    """
    return eqx.field(metadata={"decay": decay, "cast": cast, "split": split, "fp8": fp8})


def declarations(tree: Any) -> Any:
    """A tree like `tree` with the `Declaration` of each parameter in its place."""

    def declared(path: tuple[Any, ...], leaf: Any) -> Declaration:
        owner, node = tree, tree
        for entry in path:
            owner, node = node, getattr(node, entry.name) if hasattr(entry, "name") else node[entry.idx]
        name = path[-1].name
        (metadata,) = (field.metadata for field in dataclasses.fields(owner) if field.name == name)
        hint = get_type_hints(type(owner))[name]
        hint = next((option for option in get_args(hint) if hasattr(option, "dim_str")), hint)
        axes = tuple(hint.dim_str.split())
        stacked = ("layers",) * (len(leaf.shape) - len(axes))
        axes, divided, split = stacked + axes, metadata["split"], None
        if isinstance(divided, str):
            split = (axes.index(divided), leaf.shape[axes.index(divided)]) if divided else None
        elif own := divided(owner):
            split = own[0] + len(stacked), own[1]
        fp8 = owner.block_size if metadata["fp8"] and owner.use_fp8 else None
        return Declaration(axes, metadata["decay"], metadata["cast"], split, fp8)

    return jax.tree_util.tree_map_with_path(declared, tree, is_leaf=is_parameter)


def is_parameter(node: Any) -> bool:
    """Whether a node of a model is a parameter that is no array: one held in 8 bits."""
    return isinstance(node, Quantized)


def count(tree: Any) -> int:
    """Numbers that the arrays of a tree hold; abstract arrays will do."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def normal(key: PRNGKeyArray, shape: tuple[int, ...], std: float) -> Float[Array, "..."]:
    """A truncated normal (at two standard deviations) whose standard deviation is `std`, in f32."""
    # Cutting at two standard deviations leaves .87962566 of the deviation.
    return std / 0.87962566 * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)
