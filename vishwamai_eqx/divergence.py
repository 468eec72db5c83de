"""How far a student's next piece is from its teacher's, without the full logits of either.

With q the teacher's target (`distill.next_piece`) and s the student's distribution, both at temperature T and summed
over the pieces, a token's terms are T² times

    forward           sum q log(q / s)                                     (1503.02531)
    reverse           sum s log(s / q)                                     (2306.08543)
    jensen_shannon    beta sum q log(q / m) + (1 - beta) sum s log(s / m)  (2306.13649)

with m = beta q + (1 - beta) s. Both heads and the terms are computed over chunks of tokens, and the gradients in the
same pass, while a chunk's logits are there; what `mesh.model` divides of the vocabularies is divided here too. The
teacher gets no gradient.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.compat import vary_alike, zeros_varying_like
from vishwamai_eqx import mesh
from vishwamai_eqx.distill import VocabularyMap, next_piece
from vishwamai_eqx.layers import wide
from vishwamai_eqx.loss import capped, dot

# Tokens whose logits live at once: as many as fill the units of an accelerator, and no more.
CHUNK_TOKENS = 128


class Terms(eqx.Module):
    """A number for each term, None for those that nobody asks for: weights of them, or their sums over tokens."""

    forward: Float[Array, ""] | None = None
    reverse: Float[Array, ""] | None = None
    jensen_shannon: Float[Array, ""] | None = None


class Closeness(eqx.Module):
    """How near the student is, whatever it is trained with: sums over tokens."""

    kl: Float[Array, ""]
    """Forward, at a temperature of 1, in nats."""
    agreement: Float[Array, ""]
    """Tokens after which both hold the same piece for the likeliest."""


@dataclass(frozen=True)
class Softness:
    """What the terms are taken at."""

    temperature: float = 1.0
    beta: float = 0.5
    """The teacher's share of the mixture that Jensen-Shannon compares with."""
    softcap: float | None = None
    """The bound of the student's logits."""
    teacher_softcap: float | None = None


class Teacher(eqx.Module):
    """What the teacher gives for each of its tokens."""

    hidden: Float[Array, "batch seq teacher_d_model"]
    """Final hidden states, after the token."""
    weight: Float[Array, "teacher teacher_d_model"]
    """Its head's, in the type of `hidden`."""
    tokens: Int[Array, "batch seq"]
    vocabulary: VocabularyMap


def divergences(
    hidden: Float[Array, "batch seq d_model"],
    weight: Float[Array, "pieces d_model"],
    teacher: Teacher,
    mask: Float[Array, "batch seq"],
    weights: Terms,
    softness: Softness,
) -> tuple[Float[Array, ""], Terms, Closeness]:
    """The weighted sum over the masked tokens of the terms that have weights, each of them, and how close it is.

    `hidden` is the student's where each of the teacher's tokens ends; `weight` is its head's, in the type of `hidden`.
    Sums, not means: the caller divides by the token count of the whole step. Only the first has gradients.
    """
    tokens = mask.size
    chunk = min(CHUNK_TOKENS, tokens)
    chunks = math.ceil(tokens / chunk)
    hidden, theirs, read, mask = (
        jnp.pad(each.reshape(tokens, *each.shape[2:]), [(0, chunks * chunk - tokens)] + [(0, 0)] * (each.ndim - 2))
        for each in vary_alike((hidden, teacher.hidden, teacher.tokens, mask))
    )
    hidden, theirs, read, mask = (each.reshape(chunks, chunk, *each.shape[1:]) for each in (hidden, theirs, read, mask))
    theirs = with_last(theirs)
    # Of the vocabularies each device along `model` has its part.
    both = (mesh.vary(hidden, "model"), weight, mesh.vary(theirs, "model"), teacher.weight)
    hidden, weight, theirs, teacher_weight = vary_alike(both)
    sums: Any = chunked(hidden, weight, theirs, teacher_weight, read, mask, weights, teacher.vocabulary, softness)
    total, (terms, closeness) = sums
    return total, terms, closeness


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def chunked(
    hidden: Float[Array, "chunks chunk d_model"],
    weight: Float[Array, "pieces d_model"],
    theirs: Float[Array, "chunks chunk_and_one teacher_d_model"],
    teacher_weight: Float[Array, "teacher teacher_d_model"],
    read: Int[Array, "chunks chunk"],
    mask: Float[Array, "chunks chunk"],
    weights: Terms,
    vocabulary: VocabularyMap,
    softness: Softness,
) -> tuple[Float[Array, ""], tuple[Terms, Closeness]]:
    def add(sums: Any, xs: tuple[Array, ...]) -> tuple[Any, None]:
        hidden, theirs, read, mask = xs
        q = target(theirs, teacher_weight, read, vocabulary, softness)
        return add_up(sums, compare(products(weight, hidden), q, mask, weights, softness)), None

    return jax.lax.scan(add, nothing(weights, mask, hidden.dtype), (hidden, theirs, read, mask))[0]


def chunked_fwd(
    hidden: Array,
    weight: Array,
    theirs: Array,
    teacher_weight: Array,
    read: Array,
    mask: Array,
    weights: Terms,
    vocabulary: VocabularyMap,
    softness: Softness,
) -> tuple[Any, tuple[Array, Array]]:
    def add(carry: tuple[Any, Array], xs: tuple[Array, ...]) -> tuple[tuple[Any, Array], Array]:
        sums, dweight = carry
        hidden, theirs, read, mask = xs
        q = target(theirs, teacher_weight, read, vocabulary, softness)
        compared = functools.partial(compare, q=q, mask=mask, weights=weights, softness=softness)
        found, dlogits = jax.value_and_grad(compared, has_aux=True)(products(weight, hidden))
        dlogits = dlogits.astype(hidden.dtype)
        dweight += dot(dlogits, hidden, (1,), (0,))
        return (add_up(sums, found), dweight), dot(dlogits, weight, (0,), (0,)).astype(hidden.dtype)

    dweight = zeros_varying_like(weight.shape, wide(weight.dtype), weight)
    zeros = nothing(weights, mask, hidden.dtype), dweight
    (sums, dweight), dhidden = jax.lax.scan(add, zeros, (hidden, theirs, read, mask))
    return sums, (dhidden, dweight.astype(weight.dtype))


def chunked_bwd(softness: Softness, residuals: tuple[Array, Array], g: Any) -> tuple[Any, ...]:
    dhidden, dweight = residuals
    of_total, _ = g
    return (dhidden * of_total).astype(dhidden.dtype), (dweight * of_total).astype(dweight.dtype), *(None,) * 6


chunked.defvjp(chunked_fwd, chunked_bwd)


def products(weight: Array, hidden: Array) -> Float[Array, "vocab tokens"]:
    """Logits with the vocabulary first, along which segments are summed."""
    return dot(weight, hidden, (1,), (1,))


def with_last(theirs: Float[Array, "chunks chunk width"]) -> Float[Array, "chunks chunk_and_one width"]:
    """Each chunk with the token before it, whose row says what else the first one could have been."""
    last = jnp.concatenate([jnp.zeros_like(theirs[:1, -1]), theirs[:-1, -1]])
    return jnp.concatenate([last[:, None], theirs], axis=1)


def target(
    theirs: Array, weight: Array, read: Array, vocabulary: VocabularyMap, softness: Softness
) -> Float[Array, "pieces tokens"]:
    logits, _ = capped(products(weight, theirs), softness.teacher_softcap)
    return next_piece(vocabulary, logits[:, :-1], logits[:, 1:], read)


def compare(
    logits: Float[Array, "pieces tokens"],
    q: Float[Array, "pieces tokens"],
    mask: Float[Array, "tokens"],
    weights: Terms,
    softness: Softness,
) -> tuple[Float[Array, ""], tuple[Terms, Closeness]]:
    """The terms of a chunk, from the student's logits before they are capped and the logarithms of the target."""

    def summed(of_pieces: Float[Array, "pieces tokens"]) -> Float[Array, ""]:
        return jnp.sum(mesh.sum_over(of_pieces.sum(axis=0), "model") * mask)

    def best(of_pieces: Float[Array, "pieces tokens"]) -> Float[Array, "tokens"]:
        return mesh.max_over(jax.lax.stop_gradient(of_pieces).max(axis=0), "model")

    def normalised(logits: Float[Array, "pieces tokens"]) -> Float[Array, "pieces tokens"]:
        largest = best(logits)
        return logits - largest - jnp.log(mesh.sum_over(jnp.exp(logits - largest).sum(axis=0), "model"))

    logits, _ = capped(logits, softness.softcap)
    alike = (jax.lax.stop_gradient(logits) == best(logits)) & (q == best(q))
    agreement = mesh.max_over(alike.any(axis=0).astype(logits.dtype), "model") * mask
    kl = summed(jnp.exp(q) * (q - normalised(jax.lax.stop_gradient(logits))))

    temperature, beta = softness.temperature, softness.beta
    q, s = (normalised(each / temperature) for each in (q, logits))
    found = {}
    if weights.forward is not None:
        found["forward"] = summed(jnp.exp(q) * (q - s))
    if weights.reverse is not None:
        found["reverse"] = summed(jnp.exp(s) * (s - q))
    if weights.jensen_shannon is not None:
        m = jnp.logaddexp(q + math.log(beta), s + math.log1p(-beta))
        found["jensen_shannon"] = summed(beta * jnp.exp(q) * (q - m) + (1 - beta) * jnp.exp(s) * (s - m))
    terms = Terms(**{name: temperature**2 * value for name, value in found.items()})
    total = sum(jax.tree.leaves(jax.tree.map(jnp.multiply, weights, terms)), jnp.zeros((), logits.dtype))
    return total, (terms, Closeness(kl, agreement.sum()))


def nothing(weights: Terms, like: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Terms, Closeness]]:
    """Zeros of the sums of what is of `dtype`, which vary as `like` does."""
    zero = zeros_varying_like((), wide(dtype), like)
    return zero, (jax.tree.map(lambda _: zero, weights), Closeness(zero, zero))


def add_up(sums: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, sums, more)
