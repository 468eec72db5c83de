"""What a student may have of its teacher before its first step: the embeddings of the pieces that both have."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from vishwamai_eqx.distill import VocabularyMap


def embeddings(
    own: Float[Array, "pieces d_model"], theirs: Float[Array, "teacher teacher_d_model"], vocabulary: VocabularyMap
) -> Float[Array, "pieces d_model"]:
    """The teacher's rows of the student's pieces, turned to the dimensions in which they differ most, as large as own.

    With X those rows less their mean, which no softmax over pieces sees, and V the first eigenvectors of X^T X, it is
    X V, whose inner products are as near to X's as any of that width (Eckart and Young). Where the student is the wider
    one, its further dimensions stay as they are.
    """
    first, longer = jnp.asarray(vocabulary.first), jnp.asarray(vocabulary.longer)
    width = min(own.shape[1], theirs.shape[1])
    # Each piece is one of the teacher's tokens, and every token of several pieces begins with another.
    whole = (first < vocabulary.pieces).at[longer].set(False)
    piece = jnp.where(whole, first, vocabulary.pieces)
    kept = jnp.zeros(vocabulary.pieces, jnp.int32).at[piece].set(jnp.arange(len(piece)), mode="drop")
    rows = theirs[kept].astype(own.dtype)
    rows -= rows.mean(axis=0)
    _, vectors = jnp.linalg.eigh(jnp.einsum("pi,pj->ij", rows, rows))
    vectors = vectors[:, ::-1][:, :width]
    # An eigenvector's sign is arbitrary: its largest number is positive, on any mesh.
    largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(axis=0)[None], axis=0)
    found = rows @ (vectors * jnp.sign(largest))
    found *= jnp.sqrt(jnp.mean(jnp.square(own[:, :width])) / jnp.mean(jnp.square(found)))
    return jnp.concatenate([found, own[:, width:]], axis=1)
