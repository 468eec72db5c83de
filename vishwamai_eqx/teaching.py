"""What a step learns of the teacher: its targets, how they are weighted, and what the step says of them.

The teacher reads the same text in its own tokens, in the same step, sharded as the student is and gathered layer by
layer. Where one of its tokens ends it says what the student's next piece is (`distill`); elsewhere the text alone does.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from vishwamai_eqx import teacher
from vishwamai_eqx.architecture import Model
from vishwamai_eqx.config import BATCH_AXES, Config, DistillConfig
from vishwamai_eqx.data import Batch, Dataset, PairedBatch
from vishwamai_eqx.distill import VocabularyMap, vocabulary_map
from vishwamai_eqx.divergence import Closeness, Softness, Teacher, Terms, divergences
from vishwamai_eqx.mesh import gather, place, sum_over
from vishwamai_eqx.pairs import Pairs
from vishwamai_eqx.prune import teacher_pieces
from vishwamai_eqx.tokenizer import VishwamAITokenizer


class Tutor(eqx.Module):
    """The teacher as a step takes it."""

    model: Model
    vocabulary: VocabularyMap


class Told(NamedTuple):
    """What a step says of the teacher: means over the places that have a target, in nats."""

    terms: Terms
    closeness: Closeness


class Lesson(NamedTuple):
    """What the parts of a step have in common."""

    tutor: Tutor
    specs: Any
    distill: DistillConfig
    progress: Float[Array, ""]
    """How far the run is, from 0 to 1."""
    places: Float[Array, ""]
    """How many of the step's have a target."""


def tokenizer(config: Config) -> VishwamAITokenizer | None:
    """The teacher's, if there is one; ValueError where what is under its name is none."""
    return None if config.teacher is None else teacher.tokenizer(config.teacher)


def rows(dataset: Dataset, config: Config) -> Dataset | Pairs:
    """What the steps of a run are fed with."""
    if config.teacher is None:
        return dataset
    return Pairs(dataset, teacher.tokenizer(config.teacher), fingerprints(config)["teacher"])


def fingerprints(config: Config) -> dict[str, str]:
    """Of the teacher's weights, if there is one."""
    return {} if config.teacher is None else {"teacher": teacher.fingerprint(config.teacher)}


def vocabulary(config: Config, student: VishwamAITokenizer) -> VocabularyMap | None:
    """The teacher's tokens in the student's pieces; ValueError where they are not made of them."""
    if config.teacher is None:
        return None
    theirs = teacher.tokenizer(config.teacher).proto
    normalizer = theirs.normalizer_spec
    if normalizer.name != "identity" or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces:
        raise ValueError(
            f"teacher={str(config.teacher)!r}: its tokenizer changes text before it cuts it, so that a part of a text "
            "is not read as it is in the whole; take a teacher whose tokenizer leaves text as it is, as Gemma's does"
        )
    pieces = teacher_pieces(theirs, student.proto)
    return vocabulary_map(pieces, teacher.configuration(config.teacher).model.vocab_size)


def abstract(config: Config, mesh: Mesh, dtype: str, vocabulary: VocabularyMap | None) -> tuple[Tutor, ...]:
    """The teacher's shapes, types and places: one or none, as further arguments of the step.

    For a run that there is not yet, without a `vocabulary`, it is about as large as one would be.
    """
    if config.teacher is None:
        return ()
    model = teacher.abstract(their := teacher.configuration(config.teacher), dtype)
    specs = place(model, dict(mesh.shape))
    if vocabulary is None:
        # Of Gemma's tokens that are cut to 131,072 pieces most are two pieces, and none many.
        longer = np.zeros(max(1, 5 * (their.model.vocab_size - config.model.vocab_size) // 4), np.int32)
        first = np.zeros(their.model.vocab_size, np.int32)
        vocabulary = VocabularyMap(first, longer, longer, longer, config.model.vocab_size)

    def described(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    everywhere = jax.tree.map(lambda leaf: described(leaf, PartitionSpec()), vocabulary)
    return (Tutor(jax.tree.map(described, model, specs), everywhere),)


def load(config: Config, wanted: Sequence[Tutor], vocabulary: VocabularyMap | None) -> tuple[Tutor, ...]:
    """The teacher on its devices, as `abstract` says; ValueError where the folder has not its weights."""
    if config.teacher is None or vocabulary is None:
        return ()
    (tutor,) = wanted
    there = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), vocabulary, tutor.vocabulary)
    return (Tutor(teacher.load(config.teacher, tutor.model), there),)


def begin(
    config: Config, tutor: tuple[Tutor, ...], specs: tuple[Any, ...], batch: Batch | PairedBatch, step: Int[Array, ""]
) -> Lesson | None:
    """The lesson of a step, None without a teacher; `batch` is this device's, with all microbatches."""
    if not tutor or not isinstance(batch, PairedBatch):
        return None
    places = sum_over((batch.places >= 0).sum(dtype=jnp.float32), *BATCH_AXES)
    progress = step / max(config.optim.steps - 1, 1)
    return Lesson(tutor[0], specs[0], config.distill, progress.astype(jnp.float32), jnp.maximum(places, 1))


def objective(
    lesson: Lesson | None,
    nll: Float[Array, ""],
    model: Model,
    placement: Model | None,
    hidden: Float[Array, "batch seq d_model"],
    batch: Batch | PairedBatch,
) -> tuple[Float[Array, ""], Told | None]:
    """A microbatch's part of what a step lowers, and of what it says of the teacher.

    `nll` is its part of the cross-entropy, which is all there is without a teacher.
    """
    if lesson is None or not isinstance(batch, PairedBatch):
        return nll, None
    distill, tutor, specs = lesson.distill, lesson.tutor, lesson.specs
    with jax.named_scope("teacher"):
        theirs, *_ = tutor.model(
            batch.teacher_tokens,
            segment_ids=batch.teacher_segment_ids,
            positions=batch.teacher_positions,
            placement=specs.model,
        )
        their_head = gather(tutor.model.head_weight, specs.model.head_weight, theirs.dtype)
    head = gather(model.head_weight, placement and placement.head_weight, hidden.dtype)
    weights = Terms(
        **{
            name: scheduled(values, lesson.progress)
            for name in ("forward", "reverse", "jensen_shannon")
            if any(values := getattr(distill, name))
        }
    )
    softness = Softness(distill.temperature, distill.beta, model.softcap, tutor.model.softcap)
    with jax.named_scope("divergences"):
        ended = jnp.take_along_axis(hidden, jnp.maximum(batch.places, 0)[..., None], axis=1)
        teaching = Teacher(theirs, their_head.weight, batch.teacher_tokens, tutor.vocabulary)
        known = (batch.places >= 0).astype(jnp.float32)
        sums = sum_over(divergences(ended, head.weight, teaching, known, weights, softness), *BATCH_AXES)
        total, terms, closeness = jax.tree.map(lambda of_all: of_all / lesson.places, sums)
    return scheduled(distill.cross_entropy, lesson.progress) * nll + total, Told(terms, closeness)


def scheduled(values: tuple[float, ...], progress: Float[Array, ""]) -> Float[Array, ""]:
    """A weight: the first value at the beginning of the run, the last one at its end, and even steps in between."""
    return values[0] + (values[-1] - values[0]) * progress


def row(told: Told | None) -> dict[str, Array]:
    """What a step says of the teacher, for the logbook."""
    found = {} if told is None else {**vars(told.terms), **vars(told.closeness)}
    return {name: value for name, value in found.items() if value is not None}
