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

from vishwamai_eqx import relations, teacher
from vishwamai_eqx.architecture import Model
from vishwamai_eqx.config import BATCH_AXES, Config, DistillConfig
from vishwamai_eqx.data import Batch, Dataset, PairedBatch
from vishwamai_eqx.distill import VocabularyMap, vocabulary_map
from vishwamai_eqx.divergence import Closeness, Softness, Teacher, Terms, divergences
from vishwamai_eqx.layers import wide
from vishwamai_eqx.mesh import gather, place, sum_over
from vishwamai_eqx.model import VishwamAI
from vishwamai_eqx.pairs import Pairs
from vishwamai_eqx.projections import layer_pairs
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
    hidden: Float[Array, ""] | None
    """One minus the cosine of the angle between a layer's output and the teacher's."""
    attention: Float[Array, ""] | None


class Lesson(NamedTuple):
    """What the parts of a step have in common."""

    tutor: Tutor
    specs: Any
    distill: DistillConfig
    progress: Float[Array, ""]
    """How far the run is, from 0 to 1."""
    places: Float[Array, ""]
    """How many of the step's have a target."""
    pairs: list[tuple[int, int]]
    """The student's and the teacher's layers that are held beside each other."""


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
    if not tutor or config.teacher is None or not isinstance(batch, PairedBatch):
        return None
    places = sum_over((batch.places >= 0).sum(dtype=jnp.float32), *BATCH_AXES)
    progress = step / max(config.optim.steps - 1, 1)
    pairs = layer_pairs(config.distill, config.model.num_layers, teacher.configuration(config.teacher).model.num_layers)
    return Lesson(tutor[0], specs[0], config.distill, progress.astype(jnp.float32), jnp.maximum(places, 1), pairs)


def objective(
    lesson: Lesson | None,
    nll: Float[Array, ""],
    model: Model,
    placement: Model | None,
    hidden: Float[Array, "batch seq d_model"],
    metrics: Any,
    batch: Batch | PairedBatch,
) -> tuple[Float[Array, ""], Told | None, Any]:
    """A microbatch's part of what a step lowers, and of what it says of the teacher; and the routers' metrics.

    `nll` is its part of the cross-entropy, which is all there is without a teacher. Where the lesson has pairs of
    layers, their outputs come with the metrics.
    """
    if lesson is None or not isinstance(batch, PairedBatch):
        return nll, None, metrics
    distill, tutor, specs = lesson.distill, lesson.tutor, lesson.specs
    with jax.named_scope("teacher"):
        theirs, _, *rest = tutor.model(
            batch.teacher_tokens,
            segment_ids=batch.teacher_segment_ids,
            positions=batch.teacher_positions,
            placement=specs.model,
            return_hidden=bool(lesson.pairs),
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
    total += scheduled(distill.cross_entropy, lesson.progress) * nll
    if not lesson.pairs:
        return total, Told(terms, closeness, None, None), metrics
    metrics, layers = metrics
    # A Gemma's outputs are what it gives back in place of metrics.
    said: Any = rest[0]
    their_layers = said if isinstance(said, list) else said[1]
    angles = relation = None
    if any(distill.hidden):
        with jax.named_scope("hidden_states"):
            angles = sum_over(apart(lesson, model, placement, layers, their_layers, batch), *BATCH_AXES) / lesson.places
            total += scheduled(distill.hidden, lesson.progress) * angles
    if any(distill.attention):
        with jax.named_scope("relations"):
            summed = sum_over(related(lesson, model, placement, layers, their_layers, batch), *BATCH_AXES)
            relation = summed / lesson.places
            total += scheduled(distill.attention, lesson.progress) * relation
    return total, Told(terms, closeness, angles, relation), metrics


def related(
    lesson: Lesson, model: Model, placement: Any, mine: Any, theirs: Any, batch: PairedBatch
) -> Float[Array, ""]:
    """The sum over places of the divergence of a layer's relations from the teacher's: of the last pair of layers."""
    layer, teacher_layer = lesson.pairs[-1]
    ends = jnp.maximum(batch.places, 0)[..., None]
    made = relations.projected(model, placement, layer, mine[layer - 2])
    made = [jnp.take_along_axis(each, ends, axis=1) for each in made]
    wanted = relations.projected(lesson.tutor.model, lesson.specs.model, teacher_layer, theirs[teacher_layer - 2])
    heads = lesson.distill.relation_heads
    return relations.divergence(made, wanted, batch.teacher_segment_ids, batch.places >= 0, heads)


def apart(
    lesson: Lesson, model: Model, placement: Model | None, mine: Any, theirs: Any, batch: PairedBatch
) -> Float[Array, ""]:
    """The sum over places of one minus the cosine between each pair of layers' outputs, on average over the pairs.

    Like the teacher's targets it is taken where the teacher's tokens end. The student's outputs go through its
    projections; only the angle counts, since residual streams grow from layer to layer, each model's in its own way.
    """
    assert isinstance(model, VishwamAI) and model.projections is not None
    assert placement is None or isinstance(placement, VishwamAI)
    weight = gather(model.projections, placement and placement.projections, mine.dtype).weight
    known = batch.places >= 0

    def unit(x: Array) -> Array:
        x = x.astype(wide(x.dtype))
        return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)

    total = jnp.zeros((), wide(mine.dtype))
    for number, (layer, teacher_layer) in enumerate(lesson.pairs):
        ended = jnp.take_along_axis(mine[layer - 1], jnp.maximum(batch.places, 0)[..., None], axis=1)
        cosine = jnp.sum(unit(ended @ weight[number]) * unit(theirs[teacher_layer - 1]), axis=-1)
        total += jnp.sum((1 - cosine) * known)
    return total / len(lesson.pairs)


def scheduled(values: tuple[float, ...], progress: Float[Array, ""]) -> Float[Array, ""]:
    """A weight: the first value at the beginning of the run, the last one at its end, and even steps in between."""
    return values[0] + (values[-1] - values[0]) * progress


def row(told: Told | None) -> dict[str, Array]:
    """What a step says of the teacher, for the logbook."""
    if told is None:
        return {}
    found = {**vars(told.terms), **vars(told.closeness), "hidden": told.hidden, "attention": told.attention}
    return {name: value for name, value in found.items() if value is not None}
