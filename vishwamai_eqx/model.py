"""VishwamAI: embedding, pre-norm blocks of attention and experts, final norm, head."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from kernels.gemm.meters import SEEN
from vishwamai_eqx.attention import Angles, TPUMultiHeadAttention
from vishwamai_eqx.config import AttentionPattern, Remat, ScalingConfig
from vishwamai_eqx.kv_cache import CacheSlot, KVCache, empty, rewound
from vishwamai_eqx.layers import PRODUCT_INPUT, Embedding, GatedMLP, TPULayerNorm, rotary_angles, wide
from vishwamai_eqx.mesh import gather
from vishwamai_eqx.moe import MoE, RouterMetrics
from vishwamai_eqx.nonfinite import TAP, tap
from vishwamai_eqx.projections import Projections

# Of preset tiny, with which the scales of embedding and logits were found.
WIDTH = 128
# What the forward pass leaves for backward; "none" leaves all there is.
_TAPS = jax.checkpoint_policies.save_only_these_names(TAP, SEEN)
REMAT = {
    "full": _TAPS,
    "inputs": jax.checkpoint_policies.save_only_these_names(TAP, SEEN, PRODUCT_INPUT),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _TAPS, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


class Block(eqx.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    attention_norm: TPULayerNorm
    attention: TPUMultiHeadAttention
    experts_norm: TPULayerNorm
    experts: MoE | GatedMLP

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"],
        angles: Angles,
        segment_ids: Int[Array, "batch seq"],
        slot: CacheSlot | None = None,
        *,
        key: PRNGKeyArray | None = None,
        first_row: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "batch seq d_model"], KVCache | None, RouterMetrics | None]:
        with jax.named_scope("attention"):
            y, cache = self.attention(
                self.attention_norm(x), positions, angles, segment_ids, slot, key=key, first_row=first_row
            )
        x = x + y
        y = self.experts_norm(x)
        if isinstance(self.experts, MoE):
            y, metrics = self.experts(y, (segment_ids > 0).astype(jnp.float32))
        else:
            y, metrics = self.experts(y), None
        return x + y, cache, metrics


class VishwamAI(eqx.Module):
    """A decoder with grouped-query attention, rotary positions and a mixture of gated experts.

    Parameters are f32; `compute_dtype` is the type of activations and matrix products, of which those of the blocks'
    weights, but for the router's, are in fp8 as `fp8` says. Blocks are stacked on the first axis of each of their
    arrays and scanned.
    """

    embedding: Embedding
    blocks: Block
    norm: TPULayerNorm
    untied_head: Embedding | None
    projections: Projections | None
    """Only where a run learns of a teacher's layers, while it is trained."""
    rope_theta: float = eqx.field(static=True)
    compute_dtype: str = eqx.field(static=True)
    fp8: ScalingConfig | None = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    scan_unroll: int = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 4096,
        num_layers: int = 32,
        num_heads: int = 32,
        num_experts: int = 8,
        ffn_dim: int = 16_384,
        *,
        num_kv_heads: int,
        max_seq_len: int = 2048,
        experts_per_token: int = 2,
        attention_pattern: AttentionPattern = "full",
        window: int = 512,
        attention_block: int = 128,
        attention: str = "auto",
        experts: str = "auto",
        rope_theta: float = 10_000.0,
        tie_embeddings: bool = True,
        dropout_rate: float = 0.0,
        remat: Remat = "full",
        scan_unroll: int = 1,
        compute_dtype: str = "float32",
        fp8: ScalingConfig | None = None,
        key: PRNGKeyArray,
    ):
        embedding_key, blocks_key, head_key = jax.random.split(key, 3)
        # Two branches a layer add to the residual stream; so scaled, its variance does not grow with depth.
        residual_gain = 1 / math.sqrt(2 * num_layers)

        def block(key: PRNGKeyArray) -> Block:
            attention_key, experts_key = jax.random.split(key)
            return Block(
                TPULayerNorm(hidden_size),
                TPUMultiHeadAttention(
                    hidden_size,
                    num_heads,
                    hidden_size // num_heads,
                    num_kv_heads=num_kv_heads,
                    pattern=attention_pattern,
                    window=window,
                    block=attention_block,
                    dropout_rate=dropout_rate,
                    implementation=None if attention == "auto" else attention,
                    residual_gain=residual_gain,
                    key=attention_key,
                ),
                TPULayerNorm(hidden_size),
                MoE(
                    hidden_size,
                    ffn_dim,
                    num_experts,
                    experts_per_token,
                    implementation=None if experts == "auto" else experts,
                    residual_gain=residual_gain,
                    key=experts_key,
                )
                if num_experts > 1
                else GatedMLP(hidden_size, ffn_dim, residual_gain=residual_gain, key=experts_key),
            )

        std = 0.02
        self.embedding = Embedding(vocab_size, hidden_size, std=std, key=embedding_key)
        self.blocks = eqx.filter_vmap(block)(jax.random.split(blocks_key, num_layers))
        # Logits are sums over the width, so the last norm begins at 1 / width (2203.03466) and learns how sure the
        # model may be. Else the loss of a width of 4096 would begin at seven times that of a guess.
        scale = jnp.full(hidden_size, min(1.0, WIDTH / hidden_size))
        self.norm = eqx.tree_at(lambda norm: norm.scale, TPULayerNorm(hidden_size), scale)
        self.untied_head = None if tie_embeddings else Embedding(vocab_size, hidden_size, std=std, key=head_key)
        self.projections = None
        self.rope_theta, self.compute_dtype, self.fp8 = rope_theta, compute_dtype, fp8
        self.remat, self.scan_unroll = remat, scan_unroll

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        cache: KVCache | None = None,
        key: PRNGKeyArray | None = None,
        placement: Any = None,
        first_row: Int[Array, ""] | int = 0,
        probes: Float[Array, "blocks"] | None = None,
        meters: Any = None,
        return_hidden: bool = False,
        unroll: bool = False,
    ) -> tuple[
        Float[Array, "batch seq d_model"],
        KVCache | None,
        RouterMetrics | tuple[RouterMetrics | None, Float[Array, "layers batch seq d_model"]] | None,
    ]:
        """Final hidden states, the cache with the new tokens in it, and the routers' metrics (of `[layers]`).

        With `return_hidden` each block's output, before the final norm, comes beside the metrics.

        Segment 0 is padding: it is attended to by nothing and counted nowhere. With a cache, padding comes after a
        row's tokens, and `positions` follow the cache. `key` turns dropout on. `placement` is a tree like the model
        of where its shards lie, when called inside `shard_map`; `first_row` then says which row of the whole batch
        is the first one here. `probes`, one for the embedding and one for each layer, say by their gradients whose
        output was not finite: see `nonfinite.tap`. `meters`, a tree like the model, say how its weights in fp8 and
        what they are multiplied with are scaled, and by their gradients what was seen: see `scaling`. `unroll`
        compiles the layers one after the other: see `apart`.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            start = 0 if cache is None else cache.lengths[:, None]
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        dtype = jnp.dtype(self.compute_dtype)
        with jax.named_scope("embedding"):
            embedding = gather(self.embedding, placement and placement.embedding, dtype)
            # The head wants a small embedding and the residual stream one that the branches do not drown: without the
            # factor preset tiny needed three times the tokens for the same loss. It is the same at every width: what
            # grew with it would make of the first logits those of the token that was just read.
            x = embedding(tokens).astype(dtype) * jnp.asarray(math.sqrt(WIDTH), dtype)
        if probes is not None:
            x = tap(x, probes[0])

        angles = rotary_angles(positions, self.blocks.attention.head_dim, self.rope_theta, wide(dtype))
        layers = jax.tree.leaves(self.blocks)[0].shape[0]
        block_placement = placement and jax.tree.map(without_layers, placement.blocks)

        def layer(carry: tuple[Array, KVCache | None], xs: Any) -> tuple[tuple, tuple]:
            x, cache = carry
            shards, index, probe, meters = xs
            # Gathered here, inside what remat repeats, so that no more than one layer's weights live at a time.
            block = gather(shards, block_placement, dtype, fp8=self.fp8, meters=meters)
            slot = None if cache is None else CacheSlot(cache, index)
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x, cache, metrics = block(x, positions, angles, segment_ids, slot, key=layer_key, first_row=first_row)
            x = x if probe is None else tap(x, probe)
            return (x, cache), (metrics, x if return_hidden else None)

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.remat], prevent_cse=False)
        xs = (self.blocks, jnp.arange(layers), None if probes is None else probes[1:], meters and meters.blocks)
        # With a cache each layer is little work, and unrolling them makes it none the less.
        steps = layers if unroll else min(self.scan_unroll, layers) if cache is None else 1
        (x, cache), (metrics, outputs) = jax.lax.scan(layer, (x, cache), xs, unroll=steps)
        if cache is not None:
            cache = rewound(cache, cache.lengths + (segment_ids > 0).sum(axis=1, dtype=jnp.int32))
        hidden = gather(self.norm, placement and placement.norm, dtype)(x)
        return hidden, cache, metrics if outputs is None else (metrics, outputs)

    @property
    def stacks(self) -> list[Block]:
        """The blocks, by the stacks that they are kept in."""
        return [self.blocks]

    def by_layer(self, of_stacks: list[Array]) -> Array:
        """What there is of each layer, in their order, given it for each of the stacks."""
        (layers,) = of_stacks
        return layers

    @property
    def softcap(self) -> None:
        """Logits are not capped."""
        return None

    @property
    def head_weight(self) -> Embedding:
        """The embedding that hidden states are compared with: the input's own unless the head is untied."""
        return self.embedding if self.untied_head is None else self.untied_head

    def head(self, hidden: Float[Array, "*batch d_model"], placement: Any = None) -> Float[Array, "*batch vocab"]:
        """Logits in f32, with `placement` of this device's part of the vocabulary.

        Training never makes them all at once: see `loss.cross_entropy`.
        """
        return gather(self.head_weight, placement and placement.head_weight, hidden.dtype).logits(hidden)

    def new_cache(self, batch: int, length: int, slack: int = 0) -> KVCache:
        """An empty cache for `batch` rows of at most `length` tokens."""
        attention = self.blocks.attention
        layers = attention.query.weight.shape[0]
        return empty(layers, batch, attention.num_kv_heads, length, attention.head_dim, self.compute_dtype)


def without_layers(spec: jax.sharding.PartitionSpec) -> jax.sharding.PartitionSpec:
    """The place of one layer's array, given that of the stack."""
    return jax.sharding.PartitionSpec(*spec[1:])
