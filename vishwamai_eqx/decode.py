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


class Guide(NamedTuple):
    """A smaller model that drafts, and what its vocabulary has to do with the model's own: see `draft`.

    It drafts only tokens that are one piece of its own, and reads others piece by piece (2502.05202).
    """

    model: CachedModel
    pieces: Int[Any, "vocab most"]
    """Each token in the guide's pieces."""
    counts: Int[Any, "vocab"]
    """How many they are."""
    kept: Int[Any, "pieces"]
    """The token that each of its pieces is."""


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

    vocab = _vocab(model)

    def make(model: CachedModel) -> Rows:
        made = _empty(model, vocab, rows // size(*BATCH_AXES), length, slack)
        return jax.tree.map(lambda leaf, spec: vary(leaf, *_axes(spec)), made, specs_of(made, at))

    out = specs_of(jax.eval_shape(lambda model: _empty(model, vocab, rows, length, slack), model), at)
    return jax.shard_map(make, mesh=at.mesh, in_specs=(_model(model, at),), out_specs=out)(model)


@functools.partial(jax.jit, static_argnames=("at", "length", "slack"))
def grow(model: CachedModel, rows: Rows, *, at: Where, length: int, slack: int) -> Rows:
    """The same rows in a cache for longer ones."""

    vocab = _vocab(model)

    def copy(model: CachedModel, rows: Rows) -> Rows:
        longer = _empty(model, vocab, rows.text.shape[0], length, slack)
        return kv_cache.grown(rows, longer)

    out = specs_of(jax.eval_shape(lambda model: _empty(model, vocab, rows.text.shape[0], length, slack), model), at)
    specs = _model(model, at), specs_of(rows, at)
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
    specs = specs_of(rows, at)
    sharded = jax.shard_map(read, mesh=at.mesh, in_specs=(placement, specs, P()), out_specs=specs)
    return sharded(model, rows, chunk)


@functools.partial(jax.jit, static_argnames=("at", "drafts", "steps", "guide_at"), donate_argnums=(1, 3))
def write(
    model: CachedModel,
    rows: Rows,
    guide: Guide | None,
    guided: Rows | None,
    orders: Orders,
    *,
    at: Where,
    guide_at: Where | None = None,
    drafts: int = 0,
    steps: int = STRIDE,
) -> tuple[Rows, Rows | None, Written]:
    """The rows, and a guide's, after some steps, and what was written.

    A step draws a token and reads it. With `drafts` it reads as many more behind it, of the guide's, or which
    `lookup.propose` takes from what the row has, and keeps those that are what it would have drawn (2211.17192, with
    the noise of the draws shared as in 2408.07978): the text is the same, whatever the drafts are.
    """

    def step(operands: _Operands, carry: tuple[Rows, Rows | None, Array, Array]) -> tuple[Any, Written]:
        model, guide, orders = operands
        rows, guided, left, done = carry
        lengths, active = rows.cache.lengths, left > 0

        def draw(logits: Array, text: Array, first: int) -> tuple[Array, Array]:
            """Tokens from logits [batch, n, vocab], the first of them `first` further on, and what the model says."""
            batch, n, vocab = logits.shape
            ahead = first + jnp.arange(n)
            settings, rows_text = jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), (orders.settings, text))
            position = (lengths[:, None] + ahead).reshape(-1)
            drawn, said = sampling.draw(settings, logits.reshape(-1, vocab), rows_text, position, orders.pieces)
            forced = jnp.take_along_axis(orders.forced, done[:, None] + ahead, axis=1, mode="clip")
            token = jnp.where(forced < 0, drawn.reshape(batch, n), forced)
            return max_over(token, "model"), said.reshape(logits.shape)

        def append(text: Array, tokens: Array, first: int) -> Array:
            place = lengths[:, None] + first + jnp.arange(tokens.shape[1])
            place = jnp.where(active[:, None], place, text.shape[1])
            return text.at[jnp.arange(len(text))[:, None], place].set(tokens, mode="drop")

        token, said = draw(_gathered(rows.logits)[:, None], rows.text, 0)
        text, tokens = append(rows.text, token, 0), token
        before = jnp.zeros_like(lengths) if guided is None else guided.cache.lengths
        if guide is not None and guided is not None:
            pieces, counts = guide.pieces[token[:, 0]], guide.counts[token[:, 0]]
            for ahead in range(1, drafts + 2):
                there = (jnp.arange(pieces.shape[1]) < counts[:, None]) & active[:, None]
                placement = _model(guide.model, guide_at)
                hidden, cache, _ = guide.model(
                    pieces, segment_ids=there.astype(jnp.int32), cache=guided.cache, placement=placement
                )
                guided = Rows(cache, guided.text, guided.logits)
                if ahead <= drafts:
                    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
                    of_pieces = _gathered(guide.model.head(last, placement))[:, : len(guide.kept)]
                    logits = jnp.full_like(said[:, 0], -jnp.inf).at[:, guide.kept].set(of_pieces, mode="drop")
                    # With the same noise, so that it says the same as often as it can.
                    drawn, _ = draw(logits[:, None], text, ahead)
                    text, tokens = append(text, drawn, ahead), jnp.concatenate([tokens, drawn], axis=1)
                    pieces, counts = guide.pieces[drawn[:, 0]][:, :1], jnp.minimum(guide.counts[drawn[:, 0]], 1)
        elif drafts:
            proposed = lookup.propose(text, lengths + 1, drafts)
            forced = jnp.take_along_axis(orders.forced, done[:, None] + 1 + jnp.arange(drafts), axis=1, mode="clip")
            proposed = jnp.where(forced < 0, proposed, forced)
            text, tokens = append(text, proposed, 1), jnp.concatenate([tokens, proposed], axis=1)

        segment_ids = jnp.broadcast_to(active[:, None], tokens.shape).astype(jnp.int32)
        placement = _model(model, at)
        hidden, cache, _ = model(tokens, segment_ids=segment_ids, cache=rows.cache, placement=placement)
        logits = model.head(hidden, placement)
        accepted = jnp.zeros_like(left)
        if drafts:
            # How many of the drafts are what would have been drawn.
            again, more_said = draw(_gathered(logits[:, :-1]), text, 1)
            good = (again == tokens[:, 1:]) & (tokens[:, :-1] != orders.eos) & (1 + jnp.arange(drafts) < left[:, None])
            if guide is not None:
                # What is several pieces to the guide, it has not read as such.
                good = good & (guide.counts[tokens[:, 1:]] == 1)
            accepted = jnp.cumprod(good, axis=1).sum(axis=1, dtype=jnp.int32)
            said = jnp.concatenate([said, more_said], axis=1)
        logprobs = max_over(jnp.take_along_axis(said, tokens[:, :, None], axis=2)[:, :, 0], "model")
        count = jnp.where(active, 1 + accepted, 0)
        after = jnp.take_along_axis(logits, accepted[:, None, None], axis=1)[:, 0]
        ended = jnp.any((tokens == orders.eos) & (jnp.arange(drafts + 1) < count[:, None]), axis=1)
        rows = Rows(kv_cache.rewound(cache, lengths + count), text, jnp.where(active[:, None], after, rows.logits))
        if guide is not None and guided is not None:
            known = before + jnp.where(active, guide.counts[tokens[:, 0]] + accepted, 0)
            guided = Rows(kv_cache.rewound(guided.cache, known), guided.text, guided.logits)
        return (rows, guided, jnp.where(ended, 0, left - count), done + count), Written(tokens, logprobs, count)

    def loop(
        model: CachedModel, rows: Rows, guide: Guide | None, guided: Rows | None, orders: Orders
    ) -> tuple[Rows, Rows | None, Written]:
        orders = orders._replace(settings=_own(orders.settings), left=_own(orders.left), forced=_own(orders.forced))
        operands = _Operands(model, guide, orders)
        carry = rows, guided, orders.left, jnp.zeros_like(orders.left)
        (rows, guided, _, _), written = jax.lax.scan(lambda carry, _: step(operands, carry), carry, length=steps)
        return rows, guided, written

    specs, guided_specs, guide_specs = specs_of(rows, at), None, None
    if guide is not None:
        guide_specs = guide._replace(model=_model(guide.model, guide_at), pieces=P(), counts=P(), kept=P())
        guided_specs = specs_of(guided, guide_at)
    out = specs, guided_specs, on_mesh(P(None, BATCH_AXES), at.mesh)
    ins = _model(model, at), specs, guide_specs, guided_specs, P()
    sharded = jax.shard_map(loop, mesh=at.mesh, in_specs=ins, out_specs=out)
    return sharded(model, rows, guide, guided, orders)


class _Operands(NamedTuple):
    """What steps take and do not change."""

    model: CachedModel
    guide: Guide | None
    orders: Orders


def _gathered(logits: Float[Array, "*batch part"]) -> Float[Array, "*batch vocab"]:
    """Logits of the whole vocabulary."""
    names = bound("model")
    return jax.lax.all_gather(logits, names, axis=logits.ndim - 1, tiled=True) if names else logits


def _vocab(model: CachedModel) -> int:
    """Rows of the head on all devices together; inside `shard_map` it has those that it holds."""
    return model.head_weight.weight.shape[0]


def _empty(model: CachedModel, vocab: int, rows: int, length: int, slack: int) -> Rows:
    cache, text = model.new_cache(rows, length, slack), jnp.zeros((rows, length), jnp.int32)
    return Rows(cache, text, jnp.zeros((rows, vocab // size("model")), jnp.float32))


def _model(model: CachedModel, at: Where | None) -> Any:
    """A tree like the model of where its arrays lie."""
    assert at is not None
    return jax.tree.unflatten(jax.tree.structure(model), at.specs)


def specs_of(rows: Rows | None, at: Where | None) -> Any:
    """A tree like the rows of where its arrays lie."""

    assert at is not None
    mesh = at.mesh

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        if path[-1].name == "logits":
            return P(BATCH_AXES, "model")
        # Of keys and values, rows come after layers, and heads after rows.
        return P(BATCH_AXES) if len(leaf.shape) < 3 else P(None, BATCH_AXES, "model")

    return jax.tree_util.tree_map_with_path(lambda path, leaf: on_mesh(spec(path, leaf), mesh), rows)


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    return tuple(axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def _own(tree: Any) -> Any:
    """Of arrays for all devices' rows, those for this one's."""

    def part(whole: Array) -> Array:
        rows = len(whole) // size(*BATCH_AXES)
        whole = vary(jnp.asarray(whole), *BATCH_AXES)
        return jax.lax.dynamic_slice_in_dim(whole, index(*BATCH_AXES) * rows, rows)

    return jax.tree.map(part, tree)
