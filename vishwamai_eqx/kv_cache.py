"""The KV cache: what attention has read of each row, how it is stored, and what is done to its rows."""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels.compat import vary_alike
from vishwamai_eqx.mesh import size

Cache = TypeVar("Cache")
"""A `KVCache`, or a module of several with the `lengths` of all: every array has its rows on axis 1, but `lengths`."""


class KVCache(eqx.Module):
    """Keys and values of the tokens read so far; slot i of a row holds the token at position i.

    A `ring` holds the last `length` tokens: slot i then holds the newest token whose position is i modulo the length.
    """

    keys: Float[Array, "layers batch kv_heads length head_dim"]
    values: Float[Array, "layers batch kv_heads length head_dim"]
    lengths: Int[Array, "batch"]
    """Tokens that each row has read."""
    ring: bool = eqx.field(static=True, default=False)

    @property
    def length(self) -> int:
        return self.keys.shape[3]


def empty(
    layers: int, batch: int, kv_heads: int, length: int, head_dim: int, dtype: Any, ring: bool = False
) -> KVCache:
    """A cache that has read nothing; inside `shard_map` with this device's part of the heads."""
    zeros = jnp.zeros((layers, batch, max(1, kv_heads // size("model")), length, head_dim), dtype)
    return KVCache(zeros, zeros, jnp.zeros(batch, jnp.int32), ring)


def newest(lengths: Int[Array, "batch"], length: int) -> Int[Array, "batch {length}"]:
    """The position that each slot of a ring holds after so many tokens; negative where it holds none."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(length)) % length


class CacheSlot(eqx.Module):
    """One layer's part in a cache on its way through the layers: the whole cache, and which layer is reading it."""

    cache: KVCache
    layer: Int[Array, ""]

    def extend(
        self,
        keys: Float[Array, "batch seq kv_heads head_dim"],
        values: Float[Array, "batch seq kv_heads head_dim"],
        new: Int[Array, "batch"],
        window: int,
    ) -> tuple[
        KVCache,
        Float[Array, "batch seen kv_heads head_dim"],
        Float[Array, "batch seen kv_heads head_dim"],
        Int[Array, "batch seen"] | None,
    ]:
        """The cache with the new tokens in it, and all keys and values that the queries may see.

        Of a ring these come with their positions, negative where there is no token; otherwise slots are positions.
        `new` counts each row's new tokens: what follows them is padding. `window` is how far the queries look back.
        """
        cache, seq = self.cache, keys.shape[1]
        both = [(cache.keys, keys.swapaxes(1, 2)), (cache.values, values.swapaxes(1, 2))]
        positions = None
        if not cache.ring:
            written = [self._append(old, fresh, new) for old, fresh in both]
            seen = [self._of_layer(all_layers) for all_layers in written]
        elif cache.length >= window + seq - 1:
            # What the new tokens take the place of, none of their queries sees.
            written = [self._go_round(old, fresh, new) for old, fresh in both]
            seen = [self._of_layer(all_layers) for all_layers in written]
            positions = newest(cache.lengths + new, cache.length)
        else:
            # A ring that has gone round no longer holds what the first of many queries sees, so all of them look at
            # the ring as it was, and at their own keys.
            before = newest(cache.lengths, cache.length)
            own = jnp.where(jnp.arange(seq) < new[:, None], cache.lengths[:, None] + jnp.arange(seq), -1)
            positions = jnp.concatenate([before, own], axis=1)
            source = newest(cache.lengths + new, cache.length) - cache.lengths[:, None]
            written, seen = [], []
            for old, fresh in both:
                layer, fresh = self._of_layer(old), fresh.astype(old.dtype)
                seen.append(jnp.concatenate([layer, fresh], axis=2))
                taken = jnp.take_along_axis(fresh, jnp.clip(source, 0, None)[:, None, :, None], axis=2)
                layer = jnp.where((source >= 0)[:, None, :, None], taken, layer)
                written.append(lax.dynamic_update_index_in_dim(old, layer, self.layer, 0))
        after = KVCache(written[0], written[1], cache.lengths, cache.ring)
        return after, seen[0].swapaxes(1, 2), seen[1].swapaxes(1, 2), positions

    def _of_layer(self, all_layers: Array) -> Float[Array, "batch kv_heads length head_dim"]:
        return lax.dynamic_index_in_dim(all_layers, self.layer, keepdims=False)

    def _append(self, old: Array, fresh: Float[Array, "batch kv_heads seq head_dim"], new: Array) -> Array:
        """The new tokens behind each row's own, written where they are: no other part of the cache is touched."""
        batch, heads, seq, head_dim = fresh.shape
        # A window that would stick out at the end begins before, and there what is old stays.
        start = jnp.minimum(self.cache.lengths, old.shape[3] - seq)
        late = jnp.arange(seq) + (start - self.cache.lengths)[:, None]
        index = jnp.stack([jnp.broadcast_to(self.layer, (batch,)), jnp.arange(batch), start], axis=1)
        old, fresh, index, late, new = vary_alike((old, fresh.astype(old.dtype), index, late, new))
        held = lax.gather(
            old,
            index,
            lax.GatherDimensionNumbers((1, 2, 3), (0, 1), (0, 1, 3)),
            (1, 1, heads, seq, head_dim),
            indices_are_sorted=True,
            unique_indices=True,
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )
        if seq > 1:
            fresh = jnp.take_along_axis(fresh, jnp.clip(late, 0, None)[:, None, :, None], axis=2)
        fresh = jnp.where(((late >= 0) & (late < new[:, None]))[:, None, :, None], fresh, held)
        return lax.scatter(
            old,
            index,
            fresh,
            lax.ScatterDimensionNumbers((1, 2, 3), (0, 1), (0, 1, 3)),
            indices_are_sorted=True,
            unique_indices=True,
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    def _go_round(self, old: Array, fresh: Float[Array, "batch kv_heads seq head_dim"], new: Array) -> Array:
        """The new tokens in the places of the oldest."""
        batch, _, seq, _ = fresh.shape
        offset = jnp.arange(seq)
        place = (self.cache.lengths[:, None] + offset) % old.shape[3]
        place = jnp.where(offset < new[:, None], place, old.shape[3])
        at = old.at[self.layer, jnp.arange(batch)[:, None], :, place]
        return at.set(fresh.swapaxes(1, 2).astype(old.dtype), mode="drop")


def rewound(cache: Cache, lengths: Int[Array, "batch"]) -> Cache:
    """The cache with its first `lengths` tokens read; of a ring no more may go than it is longer than the window."""
    return _by_name(cache, lambda name, leaf: lengths if name == "lengths" else leaf)


def taken(cache: Cache, rows: Int[Array, "some"]) -> Cache:
    """Some of the rows."""
    return _by_name(cache, lambda name, leaf: leaf[rows] if name == "lengths" else leaf[:, rows])


def put(cache: Cache, rows: Int[Array, "some"], some: Cache) -> Cache:
    """The cache with `some` in the place of those rows; of a row that there is not nothing is kept."""

    def replaced(path: Any, leaf: Array, other: Array) -> Array:
        at = leaf.at[rows] if path[-1].name == "lengths" else leaf.at[:, rows]
        return at.set(other, mode="drop")

    return jax.tree_util.tree_map_with_path(replaced, cache, some)


def grown(cache: Cache, longer: Cache) -> Cache:
    """The same in a cache with more slots a row, which is empty."""

    # A row that no ring had room to go round in lies in the same slots of a longer ring.
    def copied(new: Array, old: Array) -> Array:
        new, old = vary_alike((new, old))
        return lax.dynamic_update_slice(new, old, (0,) * new.ndim)

    leaves = map(copied, jax.tree.leaves(longer), jax.tree.leaves(cache))
    return jax.tree.unflatten(jax.tree.structure(longer), list(leaves))


def shortest_ring(cache: Any) -> int | None:
    """Slots of the shortest ring in a cache, if it has any."""
    caches = jax.tree.leaves(cache, is_leaf=lambda node: isinstance(node, KVCache))
    return min((each.length for each in caches if isinstance(each, KVCache) and each.ring), default=None)


def _by_name(cache: Cache, change: Any) -> Cache:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: change(path[-1].name, leaf), cache)
