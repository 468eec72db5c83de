"""Cross-entropy without the full logits.

    loss = sum over tokens of weight * (logsumexp(E h) - (E h)[target])

Head and loss are computed together over chunks of tokens. Their gradients are made in the same pass, while a chunk's
logits are there: the whole takes three matrix products a chunk instead of four, and backward only scales.

Each device along the mesh's `model` has its part of the vocabulary. The largest logit, the sums of the exponentials and
the targets' logits, three numbers a token, are all that the devices tell each other on the way forward.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.compat import vary_alike, zeros_varying_like
from vishwamai_eqx import mesh
from vishwamai_eqx.layers import take_rows, wide

# Logits that live at once, 8 MB of them in f32: with four times as many, which no longer stay in a CPU's cache, a step
# of preset tiny took 3% longer.
CHUNK_LOGITS = 2**21
# A chunk has at least so many tokens, or its matrix products no longer fill the units of an accelerator.
CHUNK_TOKENS = 256


def cross_entropy(
    hidden: Float[Array, "batch seq d_model"],
    weight: Float[Array, "vocab d_model"],
    targets: Int[Array, "batch seq"],
    mask: Float[Array, "batch seq"],
    softcap: float | None = None,
) -> Float[Array, ""]:
    """The sum of the masked tokens' cross-entropy in nats; `weight` is the head's, in the type of `hidden`.

    `targets` are rows of the whole head, of which `weight` is this device's part. With `softcap`, logits are
    softcap * tanh(logits / softcap) (2408.00118). A sum, not a mean: the caller divides by the token count of the whole
    step.
    """
    batch, seq, d_model = hidden.shape
    hidden, targets, mask = vary_alike((hidden, targets, mask))
    hidden, weight = vary_alike((mesh.vary(hidden, "model"), weight))
    targets = targets - mesh.index("model") * weight.shape[0]
    chunk = max(CHUNK_LOGITS // weight.shape[0], CHUNK_TOKENS)
    longest = max(batch, seq)
    wanted = max(1, min(math.ceil(batch * seq / chunk), longest))
    # Two axes a chunk: contracting both for the weight's gradient keeps XLA's CPU library on its fast path.
    chunks = next(n for n in range(wanted, 0, -1) if batch % n == 0 or seq % n == 0)
    if 3 * chunks < 2 * wanted:
        # Neither axis divides well, such as one row of a prime length: the longer one is padded, and not counted.
        chunks = math.ceil(longest / math.ceil(longest / wanted))
        rows, columns = (-batch % chunks, 0) if batch > seq else (0, -seq % chunks)
        hidden = jnp.pad(hidden, ((0, rows), (0, columns), (0, 0)))
        targets, mask = (jnp.pad(a, ((0, rows), (0, columns))) for a in (targets, mask))
        batch, seq = targets.shape
    if batch % chunks == 0:
        shape = (chunks, batch // chunks, seq)
    else:
        shape = (chunks, batch, seq // chunks)
        hidden, targets, mask = (jnp.stack(jnp.split(a, chunks, axis=1)) for a in (hidden, targets, mask))
    return chunked(hidden.reshape(*shape, d_model), weight, targets.reshape(shape), mask.reshape(shape), softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked(
    hidden: Float[Array, "chunks rows seq d_model"],
    weight: Float[Array, "vocab d_model"],
    targets: Int[Array, "chunks rows seq"],
    mask: Float[Array, "chunks rows seq"],
    softcap: float | None,
) -> Float[Array, ""]:
    def add(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        hidden, targets, mask = chunk
        return total + chunk_loss(hidden, weight, targets, mask, softcap)[0], None

    zero = zeros_varying_like((), wide(hidden.dtype), mask)
    return jax.lax.scan(add, zero, (hidden, targets, mask))[0]


def chunk_loss(
    hidden: Float[Array, "rows seq d_model"],
    weight: Float[Array, "vocab d_model"],
    targets: Int[Array, "rows seq"],
    mask: Float[Array, "rows seq"],
    softcap: float | None,
) -> tuple[
    Float[Array, ""], Float[Array, "rows seq vocab"], Float[Array, "rows seq"], Float[Array, "rows seq d_model"], Array
]:
    """A chunk's loss; exp(logits - largest), in the type of `hidden`, and one over its sums; the targets' rows; and by
    how much a target's logit, soft-capped, grows with the product that it is made of.

    Exponentials, each times that slope of its own logit, and rows are this device's, loss and sums are of all of the
    vocabulary.
    """
    logits, slopes = capped(dot(hidden, weight, (2,), (1,)), softcap)
    largest = mesh.max_over(logits.max(axis=-1), "model")
    exponentials = (jnp.exp(logits - largest[..., None]) * slopes).astype(hidden.dtype)
    # Computed anew for their sum: on CPU XLA would keep them in f32 for both uses (3% of a step of preset tiny), on TPU
    # keep none and compute them again in each product (3% of the loss on v6e, by the compiler's cycles).
    again, exponentials = jax.lax.optimization_barrier((mesh.vary(largest, "model"), exponentials))
    total = jnp.exp(logits - again[..., None]).sum(axis=-1)
    # The target's logit anew from its row: a gather of rows is cheaper than one out of the logits.
    rows = take_rows(weight, targets).astype(logits.dtype)
    target = jnp.sum(hidden.astype(logits.dtype) * rows, axis=-1)
    total, target = mesh.sum_over((total, target), "model")
    target, slope = capped(target, softcap)
    loss = jnp.sum((jnp.log(total) + largest - target) * mask)
    return loss, exponentials, 1 / total, rows, slope


def capped(logits: Float[Array, "*shape"], softcap: float | None) -> tuple[Float[Array, "*shape"], Array]:
    """Soft-capped logits and their slopes."""
    if softcap is None:
        return logits, jnp.ones((), logits.dtype)
    share = jnp.tanh(logits / softcap)
    return softcap * share, 1 - jnp.square(share)


def chunked_fwd(
    hidden: Array, weight: Array, targets: Array, mask: Array, softcap: float | None
) -> tuple[Array, tuple[Array, Array]]:
    def add(carry: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Any]:
        """With p = e / sum(e): dh = mask (p E - E[target]) and dE = (mask h)^T p - scatter of mask h to the targets.

        Dividing by sum(e) after one product and before the other leaves e as the only array of the size of the logits.
        With a soft cap, p and the target's one are each times the slope of the cap there.
        """
        total, dweight = carry
        hidden, targets, mask = chunk
        loss, exponentials, inverse, rows, slope = chunk_loss(hidden, weight, targets, mask, softcap)
        of_target = mask * slope
        dhidden = dot(exponentials, weight, (2,), (0,)) * (inverse * mask)[..., None] - rows * of_target[..., None]
        # The smaller operand first, and transposed once at the end: see kernels.gemm.
        scaled = (hidden * (inverse * mask)[..., None]).astype(hidden.dtype)
        dweight += dot(scaled, exponentials, (0, 1), (0, 1))
        return (total + loss, dweight), (dhidden.astype(hidden.dtype), of_target)

    zero = zeros_varying_like((), wide(hidden.dtype), mask)
    dweight = zeros_varying_like(weight.shape[::-1], zero.dtype, weight)
    (total, dweight), (dhidden, of_target) = jax.lax.scan(add, (zero, dweight), (hidden, targets, mask))
    # Kept apart: with one chunk XLA would fold the transpose into the product, and its CPU library has no such in bf16.
    dweight = jax.lax.optimization_barrier(dweight).T
    dweight = dweight.at[targets].add(-hidden * of_target[..., None], mode="drop", wrap_negative_indices=False)
    return total, (dhidden, dweight.astype(weight.dtype))


def chunked_bwd(softcap: float | None, residuals: tuple[Array, Array], g: Array) -> tuple[Any, ...]:
    dhidden, dweight = residuals
    dhidden, dweight = (dhidden * g).astype(dhidden.dtype), (dweight * g).astype(dweight.dtype)
    # Together, or XLA may hold the wide gradient through all layers' backward and round it where it is needed, at the
    # end: .12 GiB in a step of preset base with `model=2` on v3.
    return *jax.lax.optimization_barrier((dhidden, dweight)), None, None


chunked.defvjp(chunked_fwd, chunked_bwd)


def dot(a: Array, b: Array, contract_a: tuple[int, ...], contract_b: tuple[int, ...]) -> Array:
    return jax.lax.dot_general(a, b, ((contract_a, contract_b), ((), ())), preferred_element_type=wide(a.dtype))
