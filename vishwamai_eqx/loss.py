"""Cross-entropy without the full logits.

    loss = sum over tokens of weight * (logsumexp(E h) - (E h)[target])

Head and loss are computed together over chunks of tokens. Their gradients are made in the same pass, while a chunk's
logits are there: the whole takes three matrix products a chunk instead of four, and backward only scales.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vishwamai_eqx.layers import wide

# Logits that live at once, 32 MB of them in f32: fewer cost more launches, and were slower on CPU too.
CHUNK_LOGITS = 2**23
# A chunk has at least so many tokens, or its matrix products no longer fill the units of an accelerator.
CHUNK_TOKENS = 256


def cross_entropy(
    hidden: Float[Array, "batch seq d_model"],
    weight: Float[Array, "vocab d_model"],
    targets: Int[Array, "batch seq"],
    mask: Float[Array, "batch seq"],
) -> Float[Array, ""]:
    """The sum of the masked tokens' cross-entropy in nats; `weight` is the head's, in the type of `hidden`.

    A sum, not a mean: the caller divides by the token count of the whole step.
    """
    batch, seq, d_model = hidden.shape
    tokens = batch * seq
    chunk = max(CHUNK_LOGITS // weight.shape[0], CHUNK_TOKENS)
    # Two axes a chunk: contracting both for the weight's gradient keeps XLA's CPU library on its fast path.
    chunks = next(n for n in range(max(1, tokens // chunk), 0, -1) if batch % n == 0 or (tokens // batch) % n == 0)
    if batch % chunks == 0:
        shape = (chunks, batch // chunks, seq)
    else:
        shape = (chunks, batch, seq // chunks)
        hidden, targets, mask = (jnp.stack(jnp.split(a, chunks, axis=1)) for a in (hidden, targets, mask))
    return chunked(hidden.reshape(*shape, d_model), weight, targets.reshape(shape), mask.reshape(shape))


@jax.custom_vjp
def chunked(
    hidden: Float[Array, "chunks rows seq d_model"],
    weight: Float[Array, "vocab d_model"],
    targets: Int[Array, "chunks rows seq"],
    mask: Float[Array, "chunks rows seq"],
) -> Float[Array, ""]:
    def add(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        hidden, targets, mask = chunk
        return total + chunk_loss(hidden, weight, targets, mask)[0], None

    return jax.lax.scan(add, zero_like_sum(hidden, weight), (hidden, targets, mask))[0]


def chunk_loss(
    hidden: Float[Array, "rows seq d_model"],
    weight: Float[Array, "vocab d_model"],
    targets: Int[Array, "rows seq"],
    mask: Float[Array, "rows seq"],
) -> tuple[
    Float[Array, ""], Float[Array, "rows seq vocab"], Float[Array, "rows seq"], Float[Array, "rows seq d_model"]
]:
    """A chunk's loss; exp(logits - largest), in the type of `hidden`, and one over its sums; the targets' rows."""
    logits = dot(hidden, weight, (2,), (1,))
    largest = logits.max(axis=-1)
    exponentials = jnp.exp(logits - largest[..., None])
    total = exponentials.sum(axis=-1)
    # The target's logit anew from its row: a gather of rows is cheaper than one out of the logits.
    rows = weight[targets].astype(logits.dtype)
    target = jnp.sum(hidden.astype(logits.dtype) * rows, axis=-1)
    loss = jnp.sum((jnp.log(total) + largest - target) * mask)
    return loss, exponentials.astype(hidden.dtype), 1 / total, rows


def chunked_fwd(hidden: Array, weight: Array, targets: Array, mask: Array) -> tuple[Array, tuple[Array, Array]]:
    def add(carry: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        """With p = e / sum(e): dh = mask (p E - E[target]) and dE = (mask h)^T p - scatter of mask h to the targets.

        Dividing by sum(e) after one product and before the other leaves e as the only array of the size of the logits.
        """
        total, dweight = carry
        hidden, targets, mask = chunk
        loss, exponentials, inverse, rows = chunk_loss(hidden, weight, targets, mask)
        dhidden = (dot(exponentials, weight, (2,), (0,)) * inverse[..., None] - rows) * mask[..., None]
        # The smaller operand first, and transposed once at the end: see kernels.gemm.
        scaled = (hidden * (inverse * mask)[..., None]).astype(hidden.dtype)
        dweight += dot(scaled, exponentials, (0, 1), (0, 1))
        return (total + loss, dweight), dhidden.astype(hidden.dtype)

    total = zero_like_sum(hidden, weight)
    dweight = jnp.zeros(weight.shape[::-1], total.dtype) + total
    (total, dweight), dhidden = jax.lax.scan(add, (total, dweight), (hidden, targets, mask))
    dweight = dweight.T.at[targets].add(-hidden * mask[..., None])
    return total, (dhidden, dweight.astype(weight.dtype))


def chunked_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Any, ...]:
    dhidden, dweight = residuals
    return (dhidden * g).astype(dhidden.dtype), (dweight * g).astype(dweight.dtype), None, None


chunked.defvjp(chunked_fwd, chunked_bwd)


def zero_like_sum(hidden: Array, weight: Array) -> Float[Array, ""]:
    """A zero that varies over the mesh as the sums over these two do, as the scan's carry has to from the start."""
    return (hidden.ravel()[0] * weight.ravel()[0] * 0).astype(wide(hidden.dtype))


def dot(a: Array, b: Array, contract_a: tuple[int, ...], contract_b: tuple[int, ...]) -> Array:
    return jax.lax.dot_general(a, b, ((contract_a, contract_b), ((), ())), preferred_element_type=wide(a.dtype))
