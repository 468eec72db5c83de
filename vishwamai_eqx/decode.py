"""Generation: prefill a KV cache, then one jitted loop of decode steps, with sampling settings and seeds by row."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int, UInt32

# Tokens that the loop makes before the host looks: text streams, and few launches are paid for.
STRIDE = 8
# Prompts and caches are padded to powers of two from here, so that few shapes are ever compiled.
SMALLEST_BUCKET = 16


@runtime_checkable
class Cache(Protocol):
    """What a model has read of each row."""

    lengths: Int[Array, "batch"]
    """Tokens read."""


@runtime_checkable
class CachedModel(Protocol):
    """What can be decoded: `VishwamAI`, and `gemma.Decoder`."""

    def __call__(self, tokens: Int[Array, "batch seq"], *, segment_ids: Any = None, cache: Any = None) -> Any:
        """Final hidden states, the cache with the tokens in it, and more."""
        ...

    def head(self, hidden: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """Logits in f32."""
        ...

    def new_cache(self, batch: int, length: int) -> Any:
        """An empty `Cache` for rows of at most `length` tokens."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the largest."""
    top_k: int = 0
    """Only the k most likely tokens are drawn; 0: all."""
    top_p: float = 1.0
    """Only the fewest most likely tokens whose probability reaches p are drawn (1904.09751)."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(
                f"temperature={self.temperature} must be at least 0 and finite; 0 is greedy, 1 the model's own."
            )
        if not 0 <= self.top_k < 2**31:
            problems.append(f"top_k={self.top_k} must be at least 0 and below 2**31; 0 draws from all tokens.")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be above 0 and at most 1; 1 draws from all tokens.")
        if problems:
            raise ValueError("\n".join(problems))


class Rows(eqx.Module):
    """The rows being generated."""

    cache: Cache
    logits: Float[Array, "batch vocab"]
    """Of the next token."""
    key: Array
    """One of each row: with the token's position it decides the draw, so neighbours do not matter."""
    done: Bool[Array, "batch"]
    temperature: Float[Array, "batch"]
    top_k: Int[Array, "batch"]
    top_p: Float[Array, "batch"]
    pieces: Int[Array, ""]
    """Rows of the head from here on are padding."""


def stream(
    model: CachedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    max_length: int | None = None,
    pieces: int | None = None,
) -> Iterator[list[list[int]]]:
    """Each row's new tokens, a few at a time as they are made; `eos_id` ends a row and is not among them.

    Row i draws with the seed's i-th key. `pieces` are the ids that the tokenizer has; those that pad the vocabulary are
    never drawn. Raises ValueError, at once, if a prompt is empty, or is with its new tokens longer than `max_length`,
    the context that the model was trained for.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("prompt: it has no token; begin it with [BOS] at least.")
    if max_length is not None and longest + max_new_tokens > max_length:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: with the prompt's {longest} tokens it is over the model's context of "
            f"{max_length}; take "
            + (f"at most {max_length - longest} or a shorter prompt." if longest < max_length else "a shorter prompt.")
        )
    return _stream(model, prompts, longest, max_new_tokens, eos_id, sampling, seed, pieces)


def _stream(
    model: CachedModel,
    prompts: Sequence[Sequence[int]],
    longest: int,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling,
    seed: int,
    pieces: int | None,
) -> Iterator[list[list[int]]]:
    tokens = np.zeros((len(prompts), bucket(longest)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    # The loop may run over by a stride, and the padding of the prompt is written too.
    length = bucket(max(tokens.shape[1], longest + max_new_tokens + STRIDE))
    settings = np.uint32(seed % 2**32), np.float32(sampling.temperature), np.int32(sampling.top_k)
    ends = np.float32(sampling.top_p), np.int32(np.iinfo(np.int32).max if pieces is None else pieces)
    rows = prefill(model, tokens, lengths, *settings, *ends, length=length)
    made, done = 0, np.zeros(len(prompts), bool)
    while made < max_new_tokens and not done.all():
        new, rows = decode(model, rows, np.int32(eos_id))
        drawn: list[list[int]] = []
        # Of several processes each has some rows, and tells the others.
        new = multihost_utils.process_allgather(new, tiled=True)
        for i, row in enumerate(new[:, : max_new_tokens - made].tolist()):
            end = row.index(eos_id) if eos_id in row else len(row)
            drawn.append([] if done[i] else row[:end])
            done[i] |= end < len(row)
        made += STRIDE
        yield drawn


def generate(model: CachedModel, prompts: Sequence[Sequence[int]], **options: object) -> list[list[int]]:
    """Each row's new tokens, all at once; takes what `stream` takes."""
    rows: list[list[int]] = [[] for _ in prompts]
    for pieces in stream(model, prompts, **options):  # pyright: ignore[reportArgumentType]
        for row, piece in zip(rows, pieces, strict=True):
            row.extend(piece)
    return rows


def bucket(length: int) -> int:
    """The next power of two."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnames="length")
def prefill(
    model: CachedModel,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, "batch"],
    seed: UInt32[Array, ""],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    pieces: Int[Array, ""],
    *,
    length: int,
) -> Rows:
    """Prompts, padded behind, read into a new cache of `length` slots, with the logits after each one's last token."""
    batch = tokens.shape[0]
    segment_ids = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    hidden, cache, _ = model(tokens, segment_ids=segment_ids, cache=model.new_cache(batch, length))
    assert cache is not None
    return Rows(
        cache,
        model.head(hidden[jnp.arange(batch), lengths - 1]),
        jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch)),
        jnp.zeros(batch, bool),
        jnp.full(batch, temperature),
        jnp.full(batch, top_k),
        jnp.full(batch, top_p),
        pieces,
    )


@functools.partial(jax.jit, donate_argnums=1)
def decode(model: CachedModel, rows: Rows, eos_id: Int[Array, ""]) -> tuple[Int[Array, "batch stride"], Rows]:
    """Draw and read `STRIDE` tokens a row; a row that is done draws on, unread."""

    def step(rows: Rows, _xs: None) -> tuple[Rows, Int[Array, "batch"]]:
        tokens = draw(rows)
        hidden, cache, _ = model(tokens[:, None], cache=rows.cache)
        done = rows.done | (tokens == eos_id)
        return eqx.tree_at(
            lambda rows: (rows.cache, rows.logits, rows.done), rows, (cache, model.head(hidden[:, 0]), done)
        ), tokens

    rows, tokens = jax.lax.scan(step, rows, length=STRIDE)
    return tokens.T, rows


def draw(rows: Rows) -> Int[Array, "batch"]:
    """A token for each row."""

    def cut(logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """The logits with -inf for what top-k and top-p leave out; of equals at the border all stay."""
        order = ordered(logits)
        kept = order >= threshold(order, jnp.ones_like(logits), rows.top_k.astype(logits.dtype))
        kept |= rows.top_k[:, None] == 0
        probabilities = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
        kept &= (order >= threshold(order, probabilities, rows.top_p)) | (rows.top_p[:, None] == 1)
        return jnp.where(kept, logits, -jnp.inf)

    logits = jnp.where(jnp.arange(rows.logits.shape[-1]) < rows.pieces, rows.logits, -jnp.inf)
    greedy = jnp.argmax(logits, axis=-1)
    scaled = logits / jnp.maximum(rows.temperature, 1e-6)[:, None]
    scaled = jax.lax.cond(jnp.any((rows.top_k > 0) | (rows.top_p < 1)), cut, lambda logits: logits, scaled)
    keys = jax.vmap(jax.random.fold_in)(rows.key, rows.cache.lengths)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(rows.temperature > 0, drawn, greedy).astype(jnp.int32)


def ordered(x: Float[Array, "batch vocab"]) -> Int[Array, "batch vocab"]:
    """Whole numbers in the order of the f32 numbers that they stand for."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def threshold(
    order: Int[Array, "batch vocab"], mass: Float[Array, "batch vocab"], enough: Float[Array, "batch"]
) -> Int[Array, "batch 1"]:
    """The largest number of each row such that the mass of what is not below it is enough.

    Found bit by bit, in 32 passes: a sort of the vocabulary is several times slower, on CPU and on TPU.
    """

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        reached = jnp.sum(jnp.where(order >= middle, mass, 0), axis=-1, keepdims=True) >= enough[:, None]
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    ends = jnp.iinfo(jnp.int32)
    low, high = jnp.full_like(order[:, :1], ends.min), jnp.full_like(order[:, :1], ends.max)
    return jax.lax.fori_loop(0, 32, halve, (low, high))[0]
