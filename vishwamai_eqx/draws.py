"""A few pieces drawn from the teacher's target in place of all of it (2503.16870).

With u_1 ... u_n drawn from q, and its entropy H(q) beside them, the forward divergence of the student's s is

    sum q log(q / s)  =  the mean, over all draws, of  -H(q) - (log s(u_1) + ... + log s(u_n)) / n

and so are its gradients. The likeliest pieces alone would be another target, whatever is done with the rest.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray

from kernels.compat import vary_alike
from vishwamai_eqx import mesh
from vishwamai_eqx.divergence import CHUNK_TOKENS, Closeness, products
from vishwamai_eqx.loss import capped


def draw(
    logarithms: Float[Array, "pieces tokens"], draws: int, key: PRNGKeyArray
) -> tuple[Int32[Array, "{draws} tokens"], Int32[Array, "tokens"], Float[Array, "tokens"]]:
    """Pieces that are drawn from each token's distribution, the likeliest one, and the entropy in nats.

    One draw from each of `draws` equal parts of the distribution: none is like another, and each piece comes as often
    as it should.
    """
    probabilities = jnp.exp(logarithms)
    entropy = -jnp.sum(probabilities * logarithms, axis=0)
    upto = jnp.cumsum(probabilities, axis=0)
    shares = (jnp.arange(draws)[:, None] + jax.random.uniform(key, (draws, logarithms.shape[1]))) / draws
    found = jax.vmap(lambda upto, at: jnp.searchsorted(upto, at, side="right"), in_axes=1, out_axes=1)(
        upto, shares * upto[-1]
    )
    drawn = jnp.minimum(found, len(logarithms) - 1)
    return drawn.astype(jnp.int32), logarithms.argmax(axis=0).astype(jnp.int32), entropy


def drawn_divergence(
    hidden: Float[Array, "batch seq d_model"],
    weight: Float[Array, "pieces d_model"],
    drawn: Int[Array, "draws batch seq"],
    likeliest: Int[Array, "batch seq"],
    entropy: Float[Array, "batch seq"],
    mask: Float[Array, "batch seq"],
    softcap: float | None = None,
) -> tuple[Float[Array, ""], Closeness]:
    """The sum over the masked tokens of the forward divergence by those draws, and how close the student is.

    `weight` is its head's, in the type of `hidden`. Over chunks of tokens, whose logits are computed again on the way
    back; each device along the mesh's `model` has its part of the pieces.
    """
    tokens = mask.size
    chunk = min(CHUNK_TOKENS, tokens)
    chunks = math.ceil(tokens / chunk)
    hidden, mask, entropy, likeliest, drawn = vary_alike((hidden, mask, entropy, likeliest, drawn))
    hidden, weight = vary_alike((mesh.vary(hidden, "model"), weight))

    def cut(x: Array, last: int = 0) -> Array:
        """Into chunks of tokens, what is of each of them behind."""
        x = x.reshape(tokens, *x.shape[x.ndim - last :])
        return jnp.pad(x, [(0, chunks * chunk - tokens)] + [(0, 0)] * last).reshape(chunks, chunk, *x.shape[1:])

    @jax.checkpoint
    def summed(hidden: Array, drawn: Array, likeliest: Array, entropy: Array, mask: Array) -> Array:
        logits, _ = capped(products(weight, hidden), softcap)
        largest = mesh.max_over(jax.lax.stop_gradient(logits).max(axis=0), "model")
        sums = mesh.sum_over(jnp.exp(logits - largest).sum(axis=0), "model")
        rows = jnp.concatenate([likeliest[None], drawn.T]) - mesh.index("model") * len(logits)
        taken = logits.at[rows, jnp.arange(chunk)].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        taken = mesh.sum_over(taken, "model")
        divergence = jnp.log(sums) + largest - taken[1:].mean(axis=0) - entropy
        return jnp.stack([jnp.sum(each * mask) for each in (divergence, taken[0] == largest)])

    cuts = cut(hidden, 1), cut(jnp.moveaxis(drawn, 0, -1), 1), cut(likeliest), cut(entropy), cut(mask)
    divergence, agreement = jax.lax.map(lambda xs: summed(*xs), cuts).sum(axis=0)
    return divergence, Closeness(jax.lax.stop_gradient(divergence), jax.lax.stop_gradient(agreement))
