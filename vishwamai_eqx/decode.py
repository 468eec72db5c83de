"""The two compiled programs of generation: reading pieces of prompts into rows of a cache, and writing on.

Both take a cache of many rows, which is donated, and what to do with each row as small arrays, the same on every
device: there each one looks up what its own rows are told. `engine` decides what that is.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from vishwamai_eqx import kv_cache, lookup, sampling
from vishwamai_eqx.config import BATCH_AXES
from vishwamai_eqx.mesh import bound, index, make_mesh, max_over, on_mesh, size, vary
from vishwamai_eqx.sampling import Settings

P = PartitionSpec
# Steps that a program makes before the host looks: text streams, and few launches are paid for.
STRIDE = 8


@runtime_checkable
class Cache(Protocol):
    """What a model has read of each row: see `kv_cache`."""

    lengths: Int[Array, "batch"]
    """Tokens read."""


@runtime_checkable
class CachedModel(Protocol):
    """What can be decoded: `VishwamAI`, and `gemma.Decoder`."""

    def __call__(
        self, tokens: Int[Array, "batch seq"], *, segment_ids: Any = None, cache: Any = None, placement: Any = None
    ) -> Any:
        """Final hidden states, the cache with the tokens in it, and more."""
        ...

    @property
    def head_weight(self) -> Any:
        """The embedding that hidden states are compared with."""
        ...

    def head(self, hidden: Float[Array, "*batch d_model"], placement: Any = None) -> Float[Array, "*batch vocab"]:
        """Logits in f32, with `placement` this device's part of them."""
        ...

    def new_cache(self, batch: int, length: int, slack: int = 0) -> Any:
        """An empty `Cache` for rows of at most `length` tokens, of which the last `slack` can be taken back."""
        ...


@dataclass(frozen=True)
class Where:
    """The mesh that a model lies on, and how."""

    mesh: Mesh
    specs: tuple[PartitionSpec, ...]
    """Of its arrays, in the order of the tree."""

    @property
    def shards(self) -> int:
        """Devices that divide the rows."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)


def where(model: CachedModel) -> Where:
    """Where a model's arrays are: as training has laid them out, or all on one device, the mesh of one."""
    leaves = jax.tree.leaves(model)
    if isinstance(leaves[0].sharding, NamedSharding):
        return Where(leaves[0].sharding.mesh, tuple(leaf.sharding.spec for leaf in leaves))
    return Where(make_mesh({}, list(leaves[0].devices())), (P(),) * len(leaves))


class Rows(eqx.Module):
    """The rows being generated."""

    cache: Cache
    text: Int[Array, "batch length"]
    """The tokens in the cache."""
    logits: Float[Array, "batch vocab"]
    """Of the next token; of each device along `model` its part of the vocabulary."""


class Chunk(NamedTuple):
    """Pieces of prompts to be read, for each device its own, side by side."""

    source: Int[Any, "pieces"]
    """The row whose cache a piece follows, among this device's own; a fork is a source that is another row."""
    start: Int[Any, "pieces"]
    """Tokens of it that count."""
    row: Int[Any, "pieces"]
    """The row that the result becomes; one that there is not, of a piece that is padding."""
    tokens: Int[Any, "pieces seq"]
    new: Int[Any, "pieces"]
    """Tokens; padding follows them."""


class Orders(NamedTuple):
    """What to write in each row."""

    settings: Settings
    left: Int[Any, "batch"]
    """Tokens to write at most; a row with none rests."""
    forced: Int[Any, "batch tokens"]
    """The next tokens, where they are not to be drawn; else -1."""
    eos: Int[Any, ""]
    """The token that ends a row."""
    pieces: Int[Any, ""]
    """Tokens that may be drawn; those that pad the vocabulary follow."""


class Written(NamedTuple):
    """Tokens by step; a step with drafts may write several."""

    tokens: Int[Array, "steps batch drafts"]
    logprobs: Float[Array, "steps batch drafts"]
    """What the model itself says of them, before penalties, temperature and cuts."""
    counts: Int[Array, "steps batch"]
    """Tokens that a step has written."""


@functools.partial(jax.jit, static_argnames=("at", "rows", "length", "slack"))
def new_rows(model: CachedModel, *, at: Where, rows: int, length: int, slack: int) -> Rows:
    """`rows` rows that have read nothing."""

    def make(model: CachedModel) -> Rows:
        made = _empty(model, rows // size(*BATCH_AXES), length, slack)
        return jax.tree.map(lambda leaf, spec: vary(leaf, *_axes(spec)), made, _specs(made, at))

    out = _specs(jax.eval_shape(lambda model: _empty(model, rows, length, slack), model), at)
    return jax.shard_map(make, mesh=at.mesh, in_specs=(_model(model, at),), out_specs=out)(model)


@functools.partial(jax.jit, static_argnames=("at", "length", "slack"))
def grow(model: CachedModel, rows: Rows, *, at: Where, length: int, slack: int) -> Rows:
    """The same rows in a cache for longer ones."""

    def copy(model: CachedModel, rows: Rows) -> Rows:
        longer = _empty(model, rows.text.shape[0], length, slack)
        return kv_cache.grown(rows, longer)

    out = _specs(jax.eval_shape(lambda model: _empty(model, rows.text.shape[0], length, slack), model), at)
    specs = _model(model, at), _specs(rows, at)
    return jax.shard_map(copy, mesh=at.mesh, in_specs=specs, out_specs=out)(model, rows)


@functools.partial(jax.jit, static_argnames="at", donate_argnums=1)
def prefill(model: CachedModel, rows: Rows, chunk: Chunk, *, at: Where) -> Rows:
    """The rows after reading pieces of prompts, with the logits after each one's last token."""

    def read(model: CachedModel, rows: Rows, chunk: Chunk) -> Rows:
        chunk = _own(chunk)
        before = kv_cache.taken(rows.cache, chunk.source)
        offset = jnp.arange(chunk.tokens.shape[1])
        there = offset < chunk.new[:, None]
        hidden, cache, _ = model(
            chunk.tokens,
            segment_ids=there.astype(jnp.int32),
            cache=kv_cache.rewound(before, chunk.start),
            placement=placement,
        )
        last = jnp.maximum(chunk.new - 1, 0)[:, None, None]
        logits = model.head(jnp.take_along_axis(hidden, last, axis=1)[:, 0], placement)
        text = rows.text[chunk.source]
        place = jnp.where(there, chunk.start[:, None] + offset, text.shape[1])
        text = text.at[jnp.arange(len(text))[:, None], place].set(chunk.tokens, mode="drop")
        return Rows(
            kv_cache.put(rows.cache, chunk.row, cache),
            rows.text.at[chunk.row].set(text, mode="drop"),
            rows.logits.at[chunk.row].set(logits, mode="drop"),
        )

    placement = _model(model, at)
    specs = _specs(rows, at)
    sharded = jax.shard_map(read, mesh=at.mesh, in_specs=(placement, specs, P()), out_specs=specs)
    return sharded(model, rows, chunk)


@functools.partial(jax.jit, static_argnames=("at", "drafts", "steps"), donate_argnums=1)
def write(
    model: CachedModel, rows: Rows, orders: Orders, *, at: Where, drafts: int = 0, steps: int = STRIDE
) -> tuple[Rows, Written]:
    """The rows after some steps, and what was written.

    A step draws a token and reads it. With `drafts` it reads as many more behind it, which `lookup.propose` takes from
    what the row has, and keeps those that are what it would have drawn (2211.17192, with the draws' noise shared as in
    2408.07978): the text is the same, whatever the drafts are.
    """
    placement = _model(model, at)

    def step(model: CachedModel, orders: Orders, carry: tuple[Rows, Array, Array]) -> tuple[Any, Written]:
        rows, left, done = carry
        lengths, text, batch = rows.cache.lengths, rows.text, jnp.arange(len(left))
        active = left > 0

        def draw(logits: Array, text: Array, more: int) -> tuple[Array, Array, Array]:
            """The token that is `more` further on, what the model says of all, and whether it is free."""
            drawn, said = sampling.draw(orders.settings, logits, text, lengths + more, orders.pieces)
            forced = jnp.take_along_axis(orders.forced, (done + more)[:, None], axis=1, mode="clip")[:, 0]
            return jnp.where(forced < 0, drawn, forced), said, forced < 0

        def gathered(logits: Array) -> Array:
            names = bound("model")
            return jax.lax.all_gather(logits, names, axis=logits.ndim - 1, tiled=True) if names else logits

        def append(text: Array, token: Array, more: int) -> Array:
            place = jnp.where(active, lengths + more, text.shape[1])
            return text.at[batch, place].set(token, mode="drop")

        token, said, _ = draw(gathered(rows.logits), text, 0)
        token = max_over(token, "model")
        text = append(text, token, 0)
        tokens, logprobs = [token], [jnp.take_along_axis(said, token[:, None], axis=1)[:, 0]]
        proposed = lookup.propose(text, lengths + 1, drafts)
        for more in range(1, drafts + 1):
            forced = jnp.take_along_axis(orders.forced, (done + more)[:, None], axis=1, mode="clip")[:, 0]
            tokens.append(jnp.where(forced < 0, proposed[:, more - 1], forced))
            text = append(text, tokens[-1], more)
        read = jnp.stack(tokens, axis=1)
        segment_ids = jnp.broadcast_to(active[:, None], read.shape).astype(jnp.int32)
        hidden, cache, _ = model(read, segment_ids=segment_ids, cache=rows.cache, placement=placement)
        logits = model.head(hidden, placement)
        # How many of the drafts are what would have been drawn.
        accepted, good = jnp.zeros_like(left), active
        whole = gathered(logits) if drafts else logits
        for more in range(1, drafts + 1):
            again, said, _ = draw(whole[:, more - 1], text, more)
            again = max_over(again, "model")
            good = good & (again == tokens[more]) & (tokens[more - 1] != orders.eos) & (more < left)
            accepted += good
            logprobs.append(jnp.take_along_axis(said, tokens[more][:, None], axis=1)[:, 0])
        count = jnp.where(active, 1 + accepted, 0)
        after = jnp.take_along_axis(logits, accepted[:, None, None], axis=1)[:, 0]
        ended = jnp.any((read == orders.eos) & (jnp.arange(drafts + 1) < count[:, None]), axis=1)
        rows = Rows(kv_cache.rewound(cache, lengths + count), text, jnp.where(active[:, None], after, rows.logits))
        said = max_over(jnp.stack(logprobs, axis=1), "model")
        return (rows, jnp.where(ended, 0, left - count), done + count), Written(read, said, count)

    def loop(model: CachedModel, rows: Rows, orders: Orders) -> tuple[Rows, Written]:
        orders = orders._replace(settings=_own(orders.settings), left=_own(orders.left), forced=_own(orders.forced))
        carry = rows, orders.left, jnp.zeros_like(orders.left)
        (rows, _, _), written = jax.lax.scan(lambda carry, _: step(model, orders, carry), carry, length=steps)
        return rows, written

    specs = _specs(rows, at)
    out = specs, on_mesh(P(None, BATCH_AXES), at.mesh)
    return jax.shard_map(loop, mesh=at.mesh, in_specs=(placement, specs, P()), out_specs=out)(model, rows, orders)


def _empty(model: CachedModel, rows: int, length: int, slack: int) -> Rows:
    vocab = model.head_weight.weight.shape[0]
    cache, text = model.new_cache(rows, length, slack), jnp.zeros((rows, length), jnp.int32)
    return Rows(cache, text, jnp.zeros((rows, vocab), jnp.float32))


def _model(model: CachedModel, at: Where) -> Any:
    """A tree like the model of where its arrays lie."""
    return jax.tree.unflatten(jax.tree.structure(model), at.specs)


def _specs(rows: Rows, at: Where) -> Any:
    """A tree like the rows of where its arrays lie."""

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        if path[-1].name == "logits":
            return P(BATCH_AXES, "model")
        # Of keys and values, rows come after layers, and heads after rows.
        return P(BATCH_AXES) if len(leaf.shape) < 3 else P(None, BATCH_AXES, "model")

    return jax.tree_util.tree_map_with_path(lambda path, leaf: on_mesh(spec(path, leaf), at.mesh), rows)


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    return tuple(axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def _own(tree: Any) -> Any:
    """Of arrays for all devices' rows, those for this one's."""

    def part(whole: Array) -> Array:
        rows = len(whole) // size(*BATCH_AXES)
        whole = vary(jnp.asarray(whole), *BATCH_AXES)
        return jax.lax.dynamic_slice_in_dim(whole, index(*BATCH_AXES) * rows, rows)

    return jax.tree.map(part, tree)
