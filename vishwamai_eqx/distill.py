"""What a teacher that reads larger tokens says of a student's next piece.

With seg(w) the student's pieces of the teacher's token w, t the token that ends where the student stands and c the
tokens before it, the next piece is u with probability

    q(u)  ∝  p(t | c) · sum of p(w | c, t) over w whose seg(w) begins with u
           + sum of p(w | c) over w whose seg(w) begins with seg(t) and goes on with u

The second line is of the tokens that the teacher might have read instead of t: the student has their beginning before
it, and cannot know that they do not come. Leaving it out, or renormalising what the teacher gives the pieces that both
have, is another distribution. Both rows are of one forward pass over the teacher's own tokens.

It is exact where no token reaches from before t past its end and none but the teacher's own begins within t. Where
the student stands inside a token, a row would be needed that no pass over the teacher's tokens has: there is no target.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from vishwamai_eqx import mesh
from vishwamai_eqx.prune import TeacherPieces


class VocabularyMap(eqx.Module):
    """The teacher's tokens in the student's pieces, as segment sums take them."""

    first: Int32[Array | np.ndarray, "teacher"]
    """The first piece of each token."""
    longer: Int32[Array | np.ndarray, "continuations"]
    """Tokens of several pieces, once for each token that their pieces begin with."""
    begins: Int32[Array | np.ndarray, "continuations"]
    """That token."""
    follows: Int32[Array | np.ndarray, "continuations"]
    """The piece after it."""
    pieces: int = eqx.field(static=True)
    """How many the student has."""


def vocabulary_map(found: TeacherPieces, rows: int) -> VocabularyMap:
    """The map for a teacher of `rows` logits, those past its tokenizer's pieces being of nothing."""
    segments = [tuple(each) for each in np.split(found.pieces, found.ends[:-1])]
    tokens = {segment: token for token, segment in enumerate(segments)}
    continuations = [
        (token, tokens[segment[:cut]], segment[cut])
        for token, segment in enumerate(segments)
        for cut in range(1, len(segment))
        if segment[:cut] in tokens
    ]
    # By the piece, so that what is summed lies together.
    continuations.sort(key=lambda each: each[2])
    longer, begins, follows = np.array(continuations, np.int32).reshape(-1, 3).T
    first = np.full(rows, len(found.kept), np.int32)
    first[: len(segments)] = [segment[0] for segment in segments]
    return VocabularyMap(first, longer, begins, follows, len(found.kept))


def next_piece(
    vocabulary: VocabularyMap,
    before: Float[Array, "teacher_part tokens"],
    after: Float[Array, "teacher_part tokens"],
    token: Int[Array, "tokens"],
) -> Float[Array, "pieces_part tokens"]:
    """Logarithms of q, from the teacher's logits before and after it read `token`.

    Of a token that none begins with, such as `<bos>`, what stands in `before` does not matter. Each device along the
    mesh's `model` has a part of the teacher's rows, and gets its part of the pieces.
    """
    vocabulary = jax.tree.map(jnp.asarray, vocabulary)
    part = after.shape[0]
    row = mesh.index("model") * part
    largest = mesh.max_over(after.max(axis=0), "model")
    exponentials = jnp.exp(after - largest)
    total = mesh.sum_over(exponentials.sum(axis=0), "model")
    first = jax.lax.dynamic_slice_in_dim(vocabulary.first, row, part)
    of_after = jax.ops.segment_sum(exponentials, first, vocabulary.pieces) / total

    # Relative to the largest of those that are compared, or a token that surprised would be rounded to nothing.
    begun = vocabulary.begins[:, None] == token
    longer = jnp.where(begun, logits_of(before, vocabulary.longer - row), -jnp.inf)
    column = jnp.arange(len(token))
    own = before.at[token - row, column].get(mode="fill", fill_value=-jnp.inf, wrap_negative_indices=False)
    own = jnp.maximum(mesh.max_over(own, "model"), jnp.finfo(own.dtype).min)
    likeliest = jnp.maximum(own, mesh.max_over(longer.max(axis=0, initial=-jnp.inf), "model"))
    of_before = jax.ops.segment_sum(
        jnp.exp(longer - likeliest), vocabulary.follows, vocabulary.pieces, indices_are_sorted=True
    )
    q = mesh.sum_over(jnp.exp(own - likeliest) * of_after + of_before, "model")
    # No piece is impossible, it is only too improbable for f32.
    logarithms = jnp.log(jnp.maximum(q, jnp.finfo(q.dtype).tiny)) - jnp.log(q.sum(axis=0))
    pieces = vocabulary.pieces // mesh.size("model")
    return jax.lax.dynamic_slice_in_dim(logarithms, mesh.index("model") * pieces, pieces)


def logits_of(logits: Float[Array, "part tokens"], rows: Int[Array, "chosen"]) -> Float[Array, "chosen tokens"]:
    """Those rows, and -inf for the ones that another device has."""
    return logits.at[rows].get(mode="fill", fill_value=-jnp.inf, wrap_negative_indices=False)
