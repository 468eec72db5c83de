"""The order in which a grouped product visits its rows."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


class Visits(NamedTuple):
    """Every stretch of rows that lies in one tile and one group, in the order of the rows.

    Every group has at least one visit, an empty one if it has no rows. Tiles that begin beyond the last group belong
    to group `groups`; rows beyond it in a tile that a group shares have no visit. A kernel prefetches these tables and
    maps step v of its grid by them.
    """

    tile: Int[Array, " visits"]
    group: Int[Array, " visits"]
    low: Int[Array, " visits"]
    """First row of the stretch, counted from the tile's first."""
    high: Int[Array, " visits"]
    """One beyond its last row; low for an empty visit."""


def visits(group_sizes: Int[Array, " groups"], rows: int, tile: int) -> Visits:
    """Cut `rows` rows at every multiple of `tile` and at every group's first row."""
    groups, tiles = group_sizes.shape[0], -(-rows // tile)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    tile_starts = jnp.arange(tiles, dtype=jnp.int32) * tile
    owner = jnp.searchsorted(ends, tile_starts, side="right").astype(jnp.int32)
    group = jnp.concatenate([jnp.arange(groups, dtype=jnp.int32), owner])
    group, start = lax.sort((group, jnp.concatenate([ends - group_sizes, tile_starts])), num_keys=2)
    index = jnp.minimum(start // tile, tiles - 1)
    end = jnp.minimum((index + 1) * tile, jnp.append(ends, tiles * tile)[group])
    # A group that begins a tile is cut twice at one row: the second is empty, so that a group begins with its rows.
    again = (group[1:] == group[:-1]) & (start[1:] == start[:-1])
    end = jnp.where(jnp.append(False, again), start, jnp.maximum(end, start))
    return Visits(index, group, start - index * tile, end - index * tile)
