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
from kernels.tpu import Generation
from vishwamai_eqx import flops, loss, optim, state, teacher
from vishwamai_eqx.config import Config, ModelConfig

F32 = 4


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
    optimizer: int
    layers: int
    """Of the parameters, those of all layers."""
    layer: int
    """Of one layer, gathered."""
    embedding: int
    """Of the embedding, gathered."""
    gathered: int
    """Of all layers, the embedding and the head."""


def estimate(config: Config, sizes: dict[str, int], generation: Generation) -> Memory:
    """The memory of a step on a mesh of those sizes, at its fullest moment."""
    model, held = config.model, shards(config, sizes)
    wide = 2 if config.precision != "f32" else F32
    tokens = rows(config, sizes) * model.max_seq_len
    stream = tokens * model.hidden_size * wide
    kept = model.num_layers * (stream + _kept_besides(config, tokens, wide, held.layer))
    # Casts of stacked weights are made for all layers at once, before the loop. The embedding's gradient is whole in
    # the compute type from the loss to the end of backward.
    casts, embedding = held.layers * wide if wide < F32 else 0, held.embedding * wide
    layer = (
        casts
        + embedding
        + max(_with_activations(model, tokens, wide, held), _with_gradients(model, tokens, wide, held))
    )
    # Both orders of the head's gradient in f32, and a chunk's logits.
    logits = max(loss.CHUNK_LOGITS, loss.CHUNK_TOKENS * model.vocab_size)
    head = casts + embedding + 2 * held.embedding * F32 + logits * (F32 + wide)
    accumulated = 2 if config.optim.microbatches > 1 else 1
    gradients = accumulated * held.parameters * F32
    # The gradients of the layers are made after the loss.
    temporaries = max(layer, head - held.parameters * F32)
    state = held.parameters * F32, held.optimizer * F32
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


def _with_activations(model: ModelConfig, tokens: int, wide: int, held: Shards) -> int:
    """The most that a layer's backward pass holds at once, where there are many rows: its weights; of the experts'
    inner width the two products of forward and the gradients of all three; of the model's width a row's input and
    result, their gradients, and both in flight."""
    return wide * (held.layer + _routed(model, tokens) * (5 * model.ffn_dim + 6 * model.hidden_size))


def _with_gradients(model: ModelConfig, tokens: int, wide: int, held: Shards) -> int:
    """The same where there are few: of the experts' three weights and their gradients, made and arriving, five."""
    return wide * (held.layer * 5 // 3 + _routed(model, tokens) * 6 * model.hidden_size)


def _kept_besides(config: Config, tokens: int, wide: int, layer: int) -> int:
    """What a layer leaves for its backward pass beside its input."""
    model, d = config.model, config.model.hidden_size
    # Queries, keys, values, and what attention gives back.
    width, kv_width = (heads * flops.head_dim(config) for heads in (model.num_heads, model.num_kv_heads))
    projections = tokens * (width + d + 2 * kv_width) * wide
    if model.remat == "full":
        return 0
    if model.remat == "dots":
        return projections
    if model.remat == "inputs":
        # Of queries, keys and values one; of attention's result; of gate and up one; of down. In fp8 a scale for every
        # 128 besides.
        numbers = tokens * (d + width) + _routed(model, tokens) * (d + model.ffn_dim)
        return numbers + numbers // 128 * F32 if config.precision == "fp8" else numbers * wide
    # Gathered weights too. Gate, up, the activation and its slope are kept as they are computed, in f32, and so are the
    # norms' parts; what attention and the experts take and give in the compute type.
    inner = _routed(model, tokens) * (model.ffn_dim * (4 * F32 + wide) + 2 * d * wide)
    return layer * wide + inner + 2 * projections + tokens * d * (6 * F32 + 4 * wide)


def _routed(model: ModelConfig, tokens: int) -> int:
    """Rows that are sent to experts, with their alignment."""
    if model.num_experts == 1:
        return tokens
    choices = tokens * model.experts_per_token
    return padded_rows(choices, model.num_experts, default_alignment(choices, model.num_experts))


def shards(config: Config, sizes: dict[str, int]) -> Shards:
    """What the state takes on a mesh of those sizes."""
    abstract = _abstract(config)
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
