"""What a step learns of the teacher: its targets, how they are weighted, and what the step says of them.

The teacher reads the same text in its own tokens, in the same step, sharded as the student is and gathered layer by
layer. Where one of its tokens ends it says what the student's next piece is (`distill`); elsewhere the text alone does.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32

from vishwamai_eqx import policy, relations, teacher
from vishwamai_eqx.architecture import Model
from vishwamai_eqx.config import BATCH_AXES, Config, DistillConfig
from vishwamai_eqx.data import Batch, Dataset, DrawnBatch, PairedBatch
from vishwamai_eqx.distill import VocabularyMap, vocabulary_map
from vishwamai_eqx.divergence import Closeness, Softness, Teacher, Terms, divergences
from vishwamai_eqx.draws import drawn_divergence
from vishwamai_eqx.inheritance import embeddings
from vishwamai_eqx.layers import wide
from vishwamai_eqx.mesh import gather, place, sum_over
from vishwamai_eqx.model import VishwamAI
from vishwamai_eqx.pairs import Pairs
from vishwamai_eqx.projections import layer_pairs
from vishwamai_eqx.prune import teacher_pieces
from vishwamai_eqx.state import TrainState
from vishwamai_eqx.targets import Targets
from vishwamai_eqx.tokenizer import VishwamAITokenizer


class Vocabularies(eqx.Module):
    """What the student's pieces are."""

    of_teacher: VocabularyMap | None
    """None where nothing is learned of the teacher's next pieces."""
    lengths: Int32[Array | np.ndarray, "vocab"]
    """Bytes of each piece."""


class Tutor(eqx.Module):
    """The teacher as a step takes it."""

    model: Model | None
    """None where what it says has been put down."""
    vocabularies: Vocabularies


class Told(NamedTuple):
    """What a step says of the teacher: means over the places that have a target, in nats."""

    terms: Terms | None
    closeness: Closeness | None
    bits_per_byte: Float[Array, ""]
    """Of the batch's text, which it is trained on."""
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
    bits: Float[Array, ""]
    """A byte's share of a nat a token."""
    cross_entropy: Float[Array, ""]
    """The weight of the text itself: none where the student wrote it."""
    pairs: list[tuple[int, int]]
    """The student's and the teacher's layers that are held beside each other."""


def tokenizer(config: Config) -> VishwamAITokenizer | None:
    """The teacher's, if there is one; ValueError where what is under its name is none."""
    return None if config.teacher is None else teacher.tokenizer(config.teacher)


def rows(dataset: Dataset, config: Config) -> Dataset | Pairs | Targets:
    """What the steps of a run are fed with."""
    if config.teacher is None:
        return dataset
    if config.distill.targets is not None:
        return Targets(dataset, config.distill.targets, config.distill.draws, fingerprints(config)["teacher"])
    return Pairs(dataset, teacher.tokenizer(config.teacher), fingerprints(config)["teacher"])


def abstract_batch(config: Config, like: jax.ShapeDtypeStruct) -> Batch | PairedBatch | DrawnBatch:
    """The shapes of what the steps are fed with, `like` being those of the student's tokens."""
    if config.teacher is None:
        return Batch(*[like] * len(Batch._fields))
    if config.distill.targets is None:
        return PairedBatch(*[like] * len(PairedBatch._fields))
    wide = (*like.shape[:-1], like.shape[-1] * config.distill.draws)
    return DrawnBatch(*[like] * 6, drawn=jax.ShapeDtypeStruct(wide, like.dtype, sharding=like.sharding))


def fingerprints(config: Config) -> dict[str, str]:
    """Of the teacher's weights, if there is one."""
    return {} if config.teacher is None else {"teacher": teacher.fingerprint(config.teacher)}


def vocabularies(config: Config, student: VishwamAITokenizer) -> Vocabularies | None:
    """The teacher's tokens in the student's pieces; ValueError where they are to be made of them and are not."""
    if config.teacher is None:
        return None
    theirs = teacher.tokenizer(config.teacher).proto
    normalizer = theirs.normalizer_spec
    if normalizer.name != "identity" or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces:
        raise ValueError(
            f"teacher={str(config.teacher)!r}: its tokenizer changes text before it cuts it, so that a part of a text "
            "is not read as it is in the whole; take a teacher whose tokenizer leaves text as it is, as Gemma's does"
        )
    lengths = student.piece_lengths.astype(np.int32)
    if not config.distill.of_pieces or config.distill.targets is not None:
        return Vocabularies(None, lengths)
    pieces = teacher_pieces(theirs, student.proto)
    return Vocabularies(vocabulary_map(pieces, teacher.configuration(config.teacher).model.vocab_size), lengths)


def abstract(config: Config, mesh: Mesh, dtype: str, vocabularies: Vocabularies | None) -> tuple[Tutor, ...]:
    """The teacher's shapes, types and places: one or none, as further arguments of the step.

    For a run that there is not yet, without `vocabularies`, they are about as large as they would be.
    """
    if config.teacher is None:
        return ()
    model, their = None, teacher.configuration(config.teacher)
    if config.distill.targets is None:
        model = teacher.abstract(their, dtype)
    specs = place(model, dict(mesh.shape))
    if vocabularies is None:
        # Of Gemma's tokens that are cut to 131,072 pieces most are two pieces, and none many.
        longer = np.zeros(max(1, 5 * (their.model.vocab_size - config.model.vocab_size) // 4), np.int32)
        first, lengths = (np.zeros(of.model.vocab_size, np.int32) for of in (their, config))
        asked = config.distill.of_pieces and model is not None
        of_teacher = VocabularyMap(first, longer, longer, longer, len(lengths)) if asked else None
        vocabularies = Vocabularies(of_teacher, lengths)

    def described(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    everywhere = jax.tree.map(lambda leaf: described(leaf, PartitionSpec()), vocabularies)
    return (Tutor(jax.tree.map(described, model, specs), everywhere),)


def load(config: Config, wanted: Sequence[Tutor], vocabularies: Vocabularies | None) -> tuple[Tutor, ...]:
    """The teacher on its devices, as `abstract` says; ValueError where the folder has not its weights."""
    if config.teacher is None or vocabularies is None:
        return ()
    (tutor,) = wanted
    there = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), vocabularies, tutor.vocabularies)
    return (Tutor(None if tutor.model is None else teacher.load(config.teacher, tutor.model), there),)


def inherit(config: Config, tutor: tuple[Tutor, ...], state: TrainState) -> TrainState:
    """A new state with what it has of its teacher, if it is to have any."""
    if not config.distill.inherit:
        return state
    (teacher,) = tutor
    assert teacher.model is not None and teacher.vocabularies.of_teacher is not None
    own, theirs = state.model.embedding.weight, teacher.model.embedding.weight
    found = jax.jit(embeddings, out_shardings=own.sharding)(own, theirs, teacher.vocabularies.of_teacher)
    return eqx.tree_at(lambda state: state.model.embedding.weight, state, found)


def begin(
    config: Config,
    tutor: tuple[Tutor, ...],
    specs: tuple[Any, ...],
    batch: Batch | PairedBatch | DrawnBatch,
    step: Int[Array, ""],
) -> Lesson | None:
    """The lesson of a step, None without a teacher; `batch` is this device's, with all microbatches."""
    if not tutor or config.teacher is None or isinstance(batch, Batch):
        return None
    real = batch.segment_ids > 0
    read = jnp.where(real, jnp.asarray(tutor[0].vocabularies.lengths)[batch.targets], 0)
    places, tokens, in_bytes = (
        sum_over(each.sum(dtype=jnp.float32), *BATCH_AXES) for each in (known(batch), real, read)
    )
    progress = (step / max(config.optim.steps - 1, 1)).astype(jnp.float32)
    pairs = layer_pairs(config.distill, config.model.num_layers, teacher.configuration(config.teacher).model.num_layers)
    return Lesson(
        tutor[0],
        specs[0],
        config.distill,
        progress,
        jnp.maximum(places, 1),
        tokens / (math.log(2) * jnp.maximum(in_bytes, 1)),
        jnp.where(policy.writes(config.distill, step), 0, scheduled(config.distill.cross_entropy, progress)),
        pairs,
    )


def objective(
    lesson: Lesson | None,
    nll: Float[Array, ""],
    model: Model,
    placement: Model | None,
    hidden: Float[Array, "batch seq d_model"],
    metrics: Any,
    batch: Batch | PairedBatch | DrawnBatch,
) -> tuple[Float[Array, ""], Told | None, Any]:
    """A microbatch's part of what a step lowers, and of what it says of the teacher; and the routers' metrics.

    `nll` is its part of the cross-entropy, which is all there is without a teacher. Where the lesson has pairs of
    layers, their outputs come with the metrics.
    """
    if lesson is None or isinstance(batch, Batch):
        return nll, None, metrics
    distill, tutor, specs = lesson.distill, lesson.tutor, lesson.specs
    bits_per_byte = nll * lesson.bits
    total, terms, closeness = lesson.cross_entropy * nll, None, None
    if isinstance(batch, DrawnBatch):
        with jax.named_scope("divergences"):
            found = of_draws(model, placement, hidden, batch, scheduled(distill.forward, lesson.progress))
            divergence, terms, closeness = jax.tree.map(lambda of_all: of_all / lesson.places, found)
        return total + divergence, Told(terms, closeness, bits_per_byte, None, None), metrics
    assert tutor.model is not None
    with jax.named_scope("teacher"):
        theirs, _, *rest = tutor.model(
            batch.teacher_tokens,
            segment_ids=batch.teacher_segment_ids,
            positions=batch.teacher_positions,
            placement=specs.model,
            return_hidden=bool(lesson.pairs),
        )
    if tutor.vocabularies.of_teacher is not None:
        with jax.named_scope("divergences"):
            found = of_pieces(lesson, tutor.vocabularies.of_teacher, model, placement, hidden, theirs, batch)
            divergence, terms, closeness = jax.tree.map(lambda of_all: of_all / lesson.places, found)
            total += divergence
    if not lesson.pairs:
        return total, Told(terms, closeness, bits_per_byte, None, None), metrics
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
    return total, Told(terms, closeness, bits_per_byte, angles, relation), metrics


def known(batch: PairedBatch | DrawnBatch) -> Bool[Array, "*microbatches batch seq"]:
    """Where there is a target: of the teacher's tokens, or of the student's pieces where they are put down so."""
    return jnp.greater_equal(batch.likeliest if isinstance(batch, DrawnBatch) else batch.places, 0)


def of_draws(
    model: Model, placement: Model | None, hidden: Float[Array, "batch seq d_model"], batch: DrawnBatch, weight: Array
) -> tuple[Float[Array, ""], Terms, Closeness]:
    """As `of_pieces`, of what has been put down."""
    head = gather(model.head_weight, placement and placement.head_weight, hidden.dtype)
    drawn = jnp.stack(jnp.split(batch.drawn, batch.drawn.shape[1] // batch.tokens.shape[1], axis=1))
    entropy = jax.lax.bitcast_convert_type(batch.entropy, jnp.float32)
    mask = known(batch).astype(jnp.float32)
    found = drawn_divergence(hidden, head.weight, drawn, batch.likeliest, entropy, mask, model.softcap)
    forward, closeness = sum_over(found, *BATCH_AXES)
    return weight * forward, Terms(forward=forward), closeness


def of_pieces(
    lesson: Lesson,
    vocabulary: VocabularyMap,
    model: Model,
    placement: Model | None,
    hidden: Float[Array, "batch seq d_model"],
    theirs: Float[Array, "batch seq teacher_d_model"],
    batch: PairedBatch,
) -> tuple[Float[Array, ""], Terms, Closeness]:
    """The sums over places of the divergences from the teacher's next pieces; both `hidden` are final states."""
    distill, tutor, specs = lesson.distill, lesson.tutor, lesson.specs
    assert tutor.model is not None
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
    ended = jnp.take_along_axis(hidden, jnp.maximum(batch.places, 0)[..., None], axis=1)
    teaching = Teacher(theirs, their_head.weight, batch.teacher_tokens, vocabulary)
    mask = known(batch).astype(jnp.float32)
    return sum_over(divergences(ended, head.weight, teaching, mask, weights, softness), *BATCH_AXES)


def related(
    lesson: Lesson, model: Model, placement: Any, mine: Any, theirs: Any, batch: PairedBatch
) -> Float[Array, ""]:
    """The sum over places of the divergence of a layer's relations from the teacher's: of the last pair of layers."""
    assert lesson.tutor.model is not None
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

    def unit(x: Array) -> Array:
        x = x.astype(wide(x.dtype))
        return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)

    total = jnp.zeros((), wide(mine.dtype))
    for number, (layer, teacher_layer) in enumerate(lesson.pairs):
        ended = jnp.take_along_axis(mine[layer - 1], jnp.maximum(batch.places, 0)[..., None], axis=1)
        cosine = jnp.sum(unit(ended @ weight[number]) * unit(theirs[teacher_layer - 1]), axis=-1)
        total += jnp.sum((1 - cosine) * known(batch))
    return total / len(lesson.pairs)


def scheduled(values: tuple[float, ...], progress: Float[Array, ""]) -> Float[Array, ""]:
    """A weight: the first value at the beginning of the run, the last one at its end, and even steps in between."""
    return values[0] + (values[-1] - values[0]) * progress


def row(told: Told | None) -> dict[str, Array]:
    """What a step says of the teacher, for the logbook."""
    if told is None:
        return {}
    found = dict(told._asdict())
    for part in (found.pop("terms"), found.pop("closeness")):
        found |= vars(part) if part is not None else {}
    return {name: value for name, value in found.items() if value is not None}
