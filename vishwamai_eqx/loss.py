"""Cross-entropy without the full logits.

    loss = sum over tokens of weight * (logsumexp(E h) - (E h)[target])

Head and loss are computed together over chunks of tokens. Their gradients are made in the same pass, while a chunk's
logits are there: the whole takes three matrix products a chunk instead of four, and backward only scales.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vishwamai_eqx.layers import wide

# Numbers of logits that live at once: 16 MB in f32 stay near the caches of a CPU.
CHUNK_LOGITS = 2**22
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


@functools.partial(jax.custom_vjp, nondiff_argnums=())
def chunked(
    hidden: Float[Array, "chunks rows seq d_model"],
    weight: Float[Array, "vocab d_model"],
    targets: Int[Array, "chunks rows seq"],
    mask: Float[Array, "chunks rows seq"],
) -> Float[Array, ""]:
    def add(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        return total + chunk_loss(*chunk[:1], weight, *chunk[1:])[0], None

    return jax.lax.scan(add, zero_like_sum(hidden, weight), (hidden, targets, mask))[0]


def chunk_loss(
    hidden: Float[Array, "rows seq d_model"],
    weight: Float[Array, "vocab d_model"],
    targets: Int[Array, "rows seq"],
    mask: Float[Array, "rows seq"],
) -> tuple[Float[Array, ""], Float[Array, "rows seq vocab"], Float[Array, "rows seq"]]:
    """A chunk's loss, its logits and their log-partition."""
    logits = dot(hidden, weight, (2,), (1,))
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    # The target's logit anew from its row: a gather of rows is cheaper than one out of the logits.
    target = jnp.sum(hidden.astype(logits.dtype) * weight[targets].astype(logits.dtype), axis=-1)
    return jnp.sum((log_partition - target) * mask), logits, log_partition


def chunked_fwd(hidden: Array, weight: Array, targets: Array, mask: Array) -> tuple[Array, tuple[Array, Array]]:
    def add(carry: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        total, dweight = carry
        hidden, targets, mask = chunk
        loss, logits, log_partition = chunk_loss(hidden, weight, targets, mask)
        probabilities = jnp.exp(logits - log_partition[..., None])
        hit = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
        dlogits = ((probabilities - hit) * mask[..., None]).astype(hidden.dtype)
        dhidden = dot(dlogits, weight, (2,), (0,)).astype(hidden.dtype)
        # The smaller operand first, and transposed once at the end: see kernels.gemm.
        dweight += dot(hidden, dlogits, (0, 1), (0, 1))
        return (total + loss, dweight), dhidden

    total = zero_like_sum(hidden, weight)
    dweight = jnp.zeros(weight.shape[::-1], total.dtype) + total
    (total, dweight), dhidden = jax.lax.scan(add, (total, dweight), (hidden, targets, mask))
    return total, (dhidden, dweight.T.astype(weight.dtype))


def chunked_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Any, ...]:
    dhidden, dweight = residuals
    return (dhidden * g).astype(dhidden.dtype), (dweight * g).astype(dweight.dtype), None, None


chunked.defvjp(chunked_fwd, chunked_bwd)


def zero_like_sum(hidden: Array, weight: Array) -> Float[Array, ""]:
    """A zero that varies over the mesh as the sums over these two do, as the scan's carry has to from the start."""
    return (hidden.ravel()[0] * weight.ravel()[0] * 0).astype(wide(hidden.dtype))


def dot(a: Array, b: Array, contract_a: tuple[int, ...], contract_b: tuple[int, ...]) -> Array:
    return jax.lax.dot_general(a, b, ((contract_a, contract_b), ((), ())), preferred_element_type=wide(a.dtype))
