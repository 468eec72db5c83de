"""How a token is drawn from logits: settings and noise of each row, so that its neighbours do not matter."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are drawn from the logits."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the largest."""
    top_k: int = 0
    """Only the k most likely tokens are drawn; 0: all."""
    top_p: float = 1.0
    """Only the fewest most likely tokens whose probability reaches p are drawn (1904.09751)."""
    min_p: float = 0.0
    """Only tokens at least so likely as this share of the likeliest one's probability are drawn (2407.01082)."""
    repetition_penalty: float = 1.0
    """What a token's logit is divided by, or multiplied if it is negative, once the row has it (1909.05858)."""
    presence_penalty: float = 0.0
    """What is taken off a token's logit once the row has written it; what the prompt has does not count."""
    seed: int | tuple[int, ...] = 0
    """With a token's position it decides the draw."""

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
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p={self.min_p} must be at least 0 and at most 1; 0 draws from all tokens.")
        if not 0 < self.repetition_penalty < math.inf:
            problems.append(
                f"repetition_penalty={self.repetition_penalty} must be above 0 and finite; 1 leaves the logits alone."
            )
        if not -math.inf < self.presence_penalty < math.inf:
            problems.append(f"presence_penalty={self.presence_penalty} must be finite; 0 leaves the logits alone.")
        if problems:
            raise ValueError("\n".join(problems))


DEFAULT = Sampling()


class Settings(NamedTuple):
    """The `Sampling` of each row as arrays."""

    words: UInt32[Any, "batch 2"]
    """Of the seed's key."""
    temperature: Float[Any, "batch"]
    top_k: Int[Any, "batch"]
    top_p: Float[Any, "batch"]
    min_p: Float[Any, "batch"]
    repetition: Float[Any, "batch"]
    presence: Float[Any, "batch"]
    prompt: Int[Any, "batch"]
    """Tokens of the row that it has not written."""


@functools.lru_cache(4096)
def words_of(seed: int | tuple[int, ...]) -> np.ndarray:
    """The key of a seed."""
    return np.random.SeedSequence(seed).generate_state(2)


def settings_of(samplings: Sequence[Sampling], prompts: Sequence[int]) -> Settings:
    """Rows' settings, given what their prompts' lengths are."""

    def floats(name: str) -> np.ndarray:
        return np.array([getattr(each, name) for each in samplings], np.float32)

    return Settings(
        np.stack([words_of(each.seed) for each in samplings]),
        floats("temperature"),
        np.array([each.top_k for each in samplings], np.int32),
        floats("top_p"),
        floats("min_p"),
        floats("repetition_penalty"),
        floats("presence_penalty"),
        np.array(prompts, np.int32),
    )


def seeded(sampling: Sampling, rows: int) -> list[Sampling]:
    """The same settings with a seed of its own for each row."""
    seed = sampling.seed if isinstance(sampling.seed, tuple) else (sampling.seed,)
    return [dataclasses.replace(sampling, seed=(*seed, row)) for row in range(rows)]


def draw(
    settings: Settings,
    logits: Float[Array, "batch vocab"],
    text: Int[Array, "batch length"],
    lengths: Int[Array, "batch"],
    pieces: Int[Array, ""],
) -> tuple[Int[Array, "batch"], Float[Array, "batch vocab"]]:
    """A token for each row, and the logarithms of the probabilities that the model itself gives to all.

    `text` is what the rows have so far, `lengths` tokens of it. From `pieces` on the vocabulary is padding.
    """

    def penalised(logits: Array) -> Array:
        slots, rows = jnp.arange(text.shape[1]), jnp.arange(text.shape[0])[:, None]
        no = jnp.zeros_like(logits, bool)
        known = slots < lengths[:, None]
        there = no.at[rows, text].max(known)
        written = no.at[rows, text].max(known & (slots >= settings.prompt[:, None]))
        factor = settings.repetition[:, None]
        logits = jnp.where(there, jnp.where(logits > 0, logits / factor, logits * factor), logits)
        return jnp.where(written, logits - settings.presence[:, None], logits)

    def sampled(logits: Array) -> Int[Array, "batch"]:
        scaled = logits / jnp.maximum(settings.temperature, 1e-6)[:, None]
        cuts = (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)
        scaled = jax.lax.cond(jnp.any(cuts), lambda scaled: cut(settings, scaled), lambda scaled: scaled, scaled)
        keys = jax.vmap(lambda words, position: jax.random.fold_in(jax.random.wrap_key_data(words), position))
        return jax.vmap(jax.random.categorical)(keys(settings.words, lengths), scaled).astype(jnp.int32)

    def greedy(logits: Array) -> Int[Array, "batch"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    logits = jnp.where(jnp.arange(logits.shape[-1]) < pieces, logits, -jnp.inf)
    said = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    penalties = jnp.any((settings.repetition != 1) | (settings.presence != 0))
    logits = jax.lax.cond(penalties, penalised, lambda logits: logits, logits)
    drawn = jax.lax.cond(jnp.any(settings.temperature > 0), sampled, greedy, logits)
    return jnp.where(settings.temperature > 0, drawn, greedy(logits)), said


def cut(settings: Settings, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
    """The logits with -inf for what top-k, top-p and min-p leave out; of equals at the border all stay."""
    order = ordered(logits)
    kept = order >= threshold(order, jnp.ones_like(logits), settings.top_k.astype(logits.dtype))
    kept |= settings.top_k[:, None] == 0
    probabilities = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    kept &= (order >= threshold(order, probabilities, settings.top_p)) | (settings.top_p[:, None] == 1)
    kept &= logits >= logits.max(axis=-1, keepdims=True) + jnp.log(settings.min_p)[:, None]
    return jnp.where(kept, logits, -jnp.inf)


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
