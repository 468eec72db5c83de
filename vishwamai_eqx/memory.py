"""A step's HBM on one device by hand, from shapes and placement alone: nothing is compiled.

What is there all the time, and what the fullest moment adds: a layer's backward pass, or the loss.

    parameters, optimiser    f32, each device its shards
    gradients                f32 shards of all layers, twice while microbatches are added up
    activations              what forward leaves for backward: each layer's input, or by the remat policy more of it
    temporaries              weights in the compute type, gathered ones and their gradients, and the layer at work
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax

from kernels.moe_dispatch.plan import default_alignment, padded_rows
from vishwamai_eqx import flops, loss, optim, state, teacher
from vishwamai_eqx.config import AUTO_MESH, Config

F32 = 4
# What comes and goes is laid out with holes between: a tenth more in the steps of tests/studies/topologies.py.
PACKING = 1.1


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    temporaries: int
    teacher: int
    """Its shards, and what of it is gathered: a layer and the head."""

    @property
    def peak(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Shards:
    """Numbers that one device holds, or gathers."""

    parameters: int
    largest: int
    """Of one array of them."""
    optimizer: int
    layers: int
    """Of the parameters, those of all layers."""
    layer: int
    """Of one layer, gathered."""
    embedding: int
    """Of the embedding, gathered."""
    gathered: int
    """Of all layers, the embedding and the head."""


def estimate(config: Config, sizes: dict[str, int]) -> Memory:
    """The memory of a step on a mesh of those sizes, at its fullest moment."""
    model, held = config.model, shards(config, sizes)
    wide = 2 if config.precision != "f32" else F32
    tokens = rows(config, sizes) * model.max_seq_len
    stream = tokens * model.hidden_size * wide
    work = _Work.of(config, sizes, tokens)
    kept = model.num_layers * (stream + _kept_besides(config, work, wide, held.layer))
    # Casts of stacked weights are made for all layers at once, before the loop. The embedding's gradient is whole in
    # the compute type from the loss to the end of backward.
    casts, embedding = held.layers * wide if wide < F32 else 0, held.embedding * wide
    layer = (
        casts
        + embedding
        + max(_with_activations(config, work, wide, held.layer), _with_gradients(config, work, wide, held.layer))
    )
    # Both orders of the head's gradient in f32, and a chunk's logits.
    logits = max(loss.CHUNK_LOGITS, loss.CHUNK_TOKENS * model.vocab_size)
    head = casts + embedding + 2 * held.embedding * F32 + logits * (F32 + wide)
    accumulated = 2 if config.optim.microbatches > 1 else 1
    gradients = accumulated * held.parameters * F32
    # The gradients of the layers are made after the loss.
    temporaries = int(max(layer, head - held.parameters * F32) + (PACKING - 1) * (gradients + kept + layer))
    state = held.parameters * F32, held.optimizer * F32
    if config.offload:
        # Both moments of the array that is updated, as they come and as they go.
        state, temporaries = (state[0], 0), temporaries + 4 * held.largest * F32
    return Memory(*state, gradients, kept, temporaries, _of_teacher(config, sizes, wide))


def _of_teacher(config: Config, sizes: dict[str, int], wide: int) -> int:
    if config.teacher is None or config.distill.targets is not None:
        return 0
    theirs = shards(teacher.configuration(config.teacher), sizes)
    return wide * (theirs.parameters + theirs.layer + theirs.embedding)


def rows(config: Config, sizes: dict[str, int]) -> int:
    """Rows of a microbatch on one device."""
    over = math.prod(size for axis, size in sizes.items() if axis != "model")
    return config.optim.batch_size // config.optim.microbatches // over


@dataclass(frozen=True)
class _Work:
    """What a layer computes with on one device."""

    tokens: int
    sent: int
    """Rows that are sent to experts, with their alignment."""
    taken: int
    """Rows that the experts which are placed here have room for, whatever the load."""
    ffn: int
    """Of an expert's inner width, the part that is here."""
    queries: int
    """Numbers that a token's queries are, of the heads here."""
    keys: int

    @classmethod
    def of(cls, config: Config, sizes: dict[str, int], tokens: int) -> "_Work":
        model, over, senders = config.model, sizes.get("model", 1), sizes.get("expert", 1)
        queries, keys = (
            max(heads // over, 1) * flops.head_dim(config) for heads in (model.num_heads, model.num_kv_heads)
        )
        sent = taken = tokens
        if model.num_experts > 1:
            choices, here = tokens * model.experts_per_token, model.num_experts // senders
            sent = padded_rows(choices, model.num_experts, default_alignment(choices, model.num_experts))
            packets = senders * tokens * min(model.experts_per_token, here)
            taken = sent if senders == 1 else padded_rows(packets, here, default_alignment(choices, here))
        return cls(tokens, sent, taken, model.ffn_dim // over, queries, keys)


def _with_activations(config: Config, work: _Work, wide: int, layer: int) -> int:
    """The most that a layer's backward pass holds at once, where there are many rows.

    Its weights; of the experts' inner width what gate, up and down made and their gradients; of the model's width a
    row's input and result, their gradients, and both in flight; and of attention what its kernel takes and gives back,
    heads of 64 in lanes of 128.
    """
    rows = 6 * work.taken * work.ffn + 3 * (work.sent + work.taken) * config.model.hidden_size
    return wide * (layer + rows) + F32 * work.tokens * (3 * work.queries + 6 * work.keys)


def _with_gradients(config: Config, work: _Work, wide: int, layer: int) -> int:
    """The same where there are few: of the experts' three weights and their gradients, made and arriving, five."""
    return wide * (layer * 5 // 3 + 3 * (work.sent + work.taken) * config.model.hidden_size)


def _kept_besides(config: Config, work: _Work, wide: int, layer: int) -> int:
    """What a layer leaves for its backward pass beside its input."""
    model, d, tokens = config.model, config.model.hidden_size, work.tokens
    # Queries, keys, values, and what attention gives back.
    projections = tokens * (work.queries + d + 2 * work.keys) * wide
    if model.remat == "full":
        return 0
    if model.remat == "dots":
        return projections
    if model.remat == "inputs":
        # Of queries, keys and values one; of attention's result; of gate and up one; of down. In fp8 a scale for every
        # 128 besides.
        numbers = tokens * (d + work.queries) + work.taken * (d + work.ffn)
        return numbers + numbers // 128 * F32 if config.precision == "fp8" else numbers * wide
    # Gathered weights too. Gate, up, the activation and its slope are kept as they are computed, in f32, and so are the
    # norms' parts; what attention and the experts take and give in the compute type.
    inner = work.taken * (work.ffn * (4 * F32 + wide) + 2 * d * wide)
    return layer * wide + inner + 2 * projections + tokens * d * (6 * F32 + 4 * wide)


def shards(config: Config, sizes: dict[str, int]) -> Shards:
    """What the state takes on a mesh of those sizes."""
    # What a search changes leaves all shapes as they are.
    shapes = dataclasses.replace(
        config,
        mesh=AUTO_MESH,
        optim=dataclasses.replace(config.optim, microbatches=1),
        model=dataclasses.replace(config.model, remat="full"),
    )
    return _shards(shapes, tuple(sizes.items()))


@functools.cache
def _shards(config: Config, placed_over: tuple[tuple[str, int], ...]) -> Shards:
    sizes, abstract = dict(placed_over), _abstract(config)
    specs = state.placement(abstract, sizes, optim.optimizer(config.optim))

    def held(tree: Any, placed: Any) -> int:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
        return sum(math.prod(leaf.shape) // _pieces(spec, sizes) for leaf, spec in pairs)

    def whole(tree: Any, placed: Any) -> int:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
        return sum(math.prod(leaf.shape) // _pieces(spec, {**sizes, "data": 1}) for leaf, spec in pairs)

    model, placed = abstract.model, specs.model
    layers = whole(model.stacks, placed.stacks)
    outside = whole(model.embedding, placed.embedding)
    head = 0 if model.untied_head is None else whole(model.untied_head, placed.untied_head)
    return Shards(
        parameters=held(model, placed),
        largest=max(map(held, jax.tree.leaves(model), jax.tree.leaves(placed))),
        optimizer=held(abstract.opt_state, specs.opt_state),
        layers=held(model.stacks, placed.stacks),
        layer=layers // config.model.num_layers,
        embedding=outside,
        gathered=layers + outside + head,
    )


@functools.cache
def _abstract(config: Config) -> Any:
    return state.abstract_state(config, "bfloat16", optim.optimizer(config.optim))


def _pieces(spec: Any, sizes: dict[str, int]) -> int:
    names = (name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ()))
    return math.prod(sizes[name] for name in names)
