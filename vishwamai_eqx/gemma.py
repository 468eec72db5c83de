"""Gemma 1, 2 and 3 (2403.08295, 2408.00118, 2503.19786) from the layers of VishwamAI.

gemma = vishwamai_eqx.gemma.load("gemma-7b")
logits = gemma(tokens)  # [batch, seq, vocab], f32
"""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vishwamai_eqx import gemma_config, huggingface_model
from vishwamai_eqx.attention import Angles, TPUMultiHeadAttention
from vishwamai_eqx.config import Remat, ScalingConfig
from vishwamai_eqx.gemma_config import GemmaConfig, LayerKind
from vishwamai_eqx.gemma_names import configuration, names
from vishwamai_eqx.kv_cache import CacheSlot, KVCache, empty, rewound
from vishwamai_eqx.layers import Embedding, GatedMLP, RMSNorm, rotary_angles, wide
from vishwamai_eqx.loss import capped
from vishwamai_eqx.mesh import gather
from vishwamai_eqx.model import REMAT, without_layers
from vishwamai_eqx.nonfinite import tap
from vishwamai_eqx.tokenizer import VishwamAITokenizer


class Block(eqx.Module):
    """x + post_norm(attention(norm(x))), then the same of the feed-forward; in Gemma 1 no norm follows a branch."""

    attention_norm: RMSNorm
    attention: TPUMultiHeadAttention
    post_attention_norm: RMSNorm | None
    mlp_norm: RMSNorm
    mlp: GatedMLP
    post_mlp_norm: RMSNorm | None

    def __init__(self, config: GemmaConfig, kind: LayerKind, attention: str = "auto", *, key: PRNGKeyArray):
        attention_key, mlp_key = jax.random.split(key)

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.attention_norm, self.mlp_norm = norm(), norm()
        self.post_attention_norm = norm() if config.has_post_norms else None
        self.post_mlp_norm = norm() if config.has_post_norms else None
        self.attention = TPUMultiHeadAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            num_kv_heads=config.num_key_value_heads,
            pattern="window" if kind == "sliding_attention" else "full",
            window=config.sliding_window,
            qk_norm_epsilon=config.rms_norm_eps if config.has_qk_norm else None,
            scale=config.query_pre_attn_scalar**-0.5,
            softcap=config.attn_logit_softcapping,
            implementation=None if attention == "auto" else attention,
            key=attention_key,
        )
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, "gelu_tanh", key=mlp_key)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"],
        angles: Angles,
        segment_ids: Int[Array, "batch seq"],
        slot: CacheSlot | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], KVCache | None]:
        with jax.named_scope("attention"):
            y, cache = self.attention(self.attention_norm(x), positions, angles, segment_ids, slot)
            x = x + (y if self.post_attention_norm is None else self.post_attention_norm(y))
        with jax.named_scope("mlp"):
            y = self.mlp(self.mlp_norm(x))
            return x + (y if self.post_mlp_norm is None else self.post_mlp_norm(y)), cache


class GemmaCache(eqx.Module):
    """A cache for each block of the period and for each of the rest; those of sliding layers are rings."""

    period: tuple[KVCache, ...]
    rest: tuple[KVCache, ...]
    lengths: Int[Array, "batch"]


class Decoder(eqx.Module):
    """Embedding, blocks, final norm and head, called as `VishwamAI` is.

    Layers of a kind repeat with a period (one, two, or six of them), over which the blocks are scanned: each of
    `period` is a stack of every p-th layer. `rest` are the layers after the last whole period, stacks of one.
    """

    embedding: Embedding
    period: tuple[Block, ...]
    rest: tuple[Block, ...]
    norm: RMSNorm
    untied_head: Embedding | None
    config: GemmaConfig = eqx.field(static=True)
    compute_dtype: str = eqx.field(static=True)
    fp8: ScalingConfig | None = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)

    def __init__(
        self,
        config: GemmaConfig,
        compute_dtype: str = "float32",
        remat: Remat = "full",
        *,
        attention: str = "auto",
        fp8: ScalingConfig | None = None,
        key: PRNGKeyArray,
    ):
        embedding_key, head_key, blocks_key, rest_key = jax.random.split(key, 4)
        repeats, rest = divmod(config.num_hidden_layers, config.period)

        def stack(kind: LayerKind, layers: int, key: PRNGKeyArray) -> Block:
            return eqx.filter_vmap(lambda key: Block(config, kind, attention, key=key))(jax.random.split(key, layers))

        def stacks(count: int, layers: int, key: PRNGKeyArray) -> tuple[Block, ...]:
            kinds = config.layer_types[:count]
            return tuple(stack(kind, layers, jax.random.fold_in(key, i)) for i, kind in enumerate(kinds))

        std = config.hidden_size**-0.5
        self.embedding = Embedding(config.vocab_size, config.hidden_size, std=std, key=embedding_key)
        self.period, self.rest = stacks(config.period, repeats, blocks_key), stacks(rest, 1, rest_key)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.untied_head = None if tied else Embedding(config.vocab_size, config.hidden_size, std=std, key=head_key)
        self.config, self.compute_dtype, self.fp8, self.remat = config, compute_dtype, fp8, remat

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        cache: GemmaCache | None = None,
        key: None = None,
        placement: Any = None,
        first_row: Int[Array, ""] | int = 0,
        probes: Float[Array, "blocks"] | None = None,
        meters: Any = None,
        return_hidden: bool = False,
        unroll: bool = False,
    ) -> tuple[Float[Array, "batch seq d_model"], GemmaCache | None, list[Float[Array, "batch seq d_model"]] | None]:
        """Final hidden states, the cache with the new tokens in it, and with `return_hidden` each block's output.

        Arguments are those of `VishwamAI`; there is no dropout that `key` and `first_row` would be for.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            start = 0 if cache is None else cache.lengths[:, None]
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        config, dtype = self.config, jnp.dtype(self.compute_dtype)
        with jax.named_scope("embedding"):
            embedding = gather(self.embedding, placement and placement.embedding, dtype)
            x = embedding(tokens).astype(dtype) * jnp.asarray(config.hidden_size**0.5, dtype)
        repeats = config.num_hidden_layers // config.period
        period_probes = rest_probes = None
        if probes is not None:
            x = tap(x, probes[0])
            period_probes, rest_probes = jnp.split(probes[1:], [repeats * config.period])
            period_probes = period_probes.reshape(repeats, config.period)
        turned = {
            "full_attention": (config.rope_theta, config.rope_factor),
            "sliding_attention": (config.rope_local_theta, config.rope_local_factor),
        }

        def kind_angles(kind: LayerKind) -> Angles:
            theta, factor = turned[kind]
            return rotary_angles(positions, config.head_dim, theta, wide(dtype), factor)

        angles = {kind: kind_angles(kind) for kind in set(config.layer_types)}

        def layers(
            x: Array, shards: Any, caches: Any, index: Array, places: Any, probes: Array | None, meters: Any
        ) -> tuple[Array, tuple, list[Array]]:
            """Some blocks one after the other, each the `index`-th of its stack."""
            outputs, read = [], []
            for i, shard in enumerate(shards):
                # Gathered here, inside what remat repeats, so that no more than a period's weights live at a time.
                place = places and jax.tree.map(without_layers, places[i])
                block = gather(shard, place, dtype, fp8=self.fp8, meters=meters and meters[i])
                slot = None if cache is None else CacheSlot(caches[i], index)
                x, after = block(x, positions, angles[config.layer_types[i]], segment_ids, slot)
                x = x if probes is None else tap(x, probes[i])
                outputs.append(x)
                read.append(after)
            return x, tuple(read), outputs

        def one_period(carry: tuple[Array, Any], xs: Any) -> tuple[tuple[Array, Any], list[Array] | None]:
            shards, index, probes, meters = xs
            places = placement and placement.period
            x, caches, outputs = layers(*carry[:1], shards, carry[1], index, places, probes, meters)
            return (x, caches), outputs if return_hidden else None

        if self.remat != "none":
            one_period = jax.checkpoint(one_period, policy=REMAT[self.remat], prevent_cse=False)
        nothing = (None,) * config.period
        carry = (x, nothing if cache is None else cache.period)
        xs = (self.period, jnp.arange(repeats), period_probes, meters and meters.period)
        steps = repeats if unroll else 1
        (x, period_caches), outputs = jax.lax.scan(one_period, carry, xs, unroll=steps)
        hidden = None
        if outputs is not None:
            # Of [repeats] each, position by position of the period, to the order of the layers.
            hidden = [stack[i] for i in range(repeats) for stack in outputs]
        rest, rest_meters = jax.tree.map(lambda leaf: leaf[0], (self.rest, meters and meters.rest))
        rest_caches = nothing if cache is None else cache.rest
        places = placement and placement.rest
        x, rest_caches, outputs = layers(x, rest, rest_caches, jnp.int32(0), places, rest_probes, rest_meters)
        if cache is not None:
            lengths = cache.lengths + (segment_ids > 0).sum(axis=1, dtype=jnp.int32)
            cache = rewound(GemmaCache(period_caches, rest_caches, lengths), lengths)
        x = gather(self.norm, placement and placement.norm, dtype)(x)
        return x, cache, None if hidden is None else hidden + outputs

    @property
    def stacks(self) -> list[Block]:
        """The blocks, by the stacks that they are kept in."""
        return [*self.period, *self.rest]

    def by_layer(self, of_stacks: list[Array]) -> Array:
        """What there is of each layer, in their order, given it for each of the stacks."""
        periods, rest = of_stacks[: len(self.period)], of_stacks[len(self.period) :]
        interleaved = jnp.stack(periods, axis=1).reshape(-1, *periods[0].shape[1:])
        return jnp.concatenate([interleaved, *rest])

    @property
    def softcap(self) -> float | None:
        """The bound of the logits."""
        return self.config.final_logit_softcapping

    @property
    def head_weight(self) -> Embedding:
        """The embedding that hidden states are compared with."""
        return self.embedding if self.untied_head is None else self.untied_head

    def head(self, hidden: Float[Array, "*batch d_model"], placement: Any = None) -> Float[Array, "*batch vocab"]:
        """Logits in f32, soft-capped where the configuration says so; with `placement` this device's part of them."""
        head = gather(self.head_weight, placement and placement.head_weight, hidden.dtype)
        return capped(head.logits(hidden), self.softcap)[0]

    def new_cache(self, batch: int, length: int, slack: int = 0) -> GemmaCache:
        """An empty cache for `batch` rows of at most `length` tokens; sliding layers keep their window only.

        The last `slack` tokens of a row can be taken back: see `rewound`.
        """
        config = self.config
        kept = config.sliding_window + slack

        def of(kind: LayerKind, layers: int) -> KVCache:
            ring = kind == "sliding_attention" and kept < length
            heads, slots = config.num_key_value_heads, kept if ring else length
            return empty(layers, batch, heads, slots, config.head_dim, self.compute_dtype, ring)

        repeats = config.num_hidden_layers // config.period
        period = tuple(of(kind, repeats) for kind in config.layer_types[: config.period])
        rest = tuple(of(kind, 1) for kind in config.layer_types[: len(self.rest)])
        return GemmaCache(period, rest, jnp.zeros(batch, jnp.int32))


class Gemma(eqx.Module):
    """A decoder whose call gives logits."""

    decoder: Decoder

    def __call__(
        self, tokens: Int[Array, "batch seq"], *, return_hidden: bool = False
    ) -> (
        Float[Array, "batch seq vocab"]
        | tuple[Float[Array, "batch seq vocab"], list[Float[Array, "batch seq d_model"]]]
    ):
        """Logits in f32, and with `return_hidden` each block's output, before the final norm."""
        x, _, hidden = self.decoder(tokens, return_hidden=return_hidden)
        logits = self.decoder.head(x)
        return logits if hidden is None else (logits, hidden)


def load(
    path: str | Path,
    dtype: Any = jnp.float32,
    *,
    compute_dtype: Any = None,
    shardings: Any = None,
    remat: Remat = "full",
) -> Gemma:
    """The Gemma of a Hugging Face folder, with parameters of `dtype` and arithmetic in `compute_dtype` (or `dtype`).

    `shardings` is a tree like the decoder of where each array goes; each device then reads its own slices.

    **Raises** ValueError for a folder that is incomplete, damaged, or another model's.
    """
    path = Path(path)
    config = configuration(path)
    if (path / "tokenizer.model").exists():
        tokenizer(path)
    compute = jnp.dtype(dtype if compute_dtype is None else compute_dtype).name
    abstract = eqx.filter_eval_shape(lambda: Decoder(config, compute, remat, key=jax.random.key(0)))
    return Gemma(read(path, abstract, jnp.dtype(dtype), shardings))


def read(folder: Path, abstract: Decoder, dtype: np.dtype, shardings: Any = None) -> Decoder:
    """The decoder of those shapes with the weights of a folder; ValueError where they are not its."""
    return huggingface_model.read(folder, abstract, names(abstract), dtype, shardings)


def check(folder: Path, abstract: Decoder) -> None:
    """Refuse, as `read` does, a folder whose weights are not of a decoder of those shapes; none of them is read."""
    huggingface_model.check(folder, abstract, names(abstract))


def tokenizer(path: str | Path) -> VishwamAITokenizer:
    """The SentencePiece model of a Gemma folder.

    **Raises** ValueError where there is none, or it makes ids that the model has no embedding for.
    """
    path = Path(path)
    config, found = gemma_config.read(path), VishwamAITokenizer(path)
    if found.vocab_size > config.vocab_size:
        raise ValueError(
            f"{found.model_path}: {found.vocab_size} pieces, but config.json says vocab_size={config.vocab_size}; "
            "take both from the same model."
        )
    return found


def save(gemma: Gemma, path: str | Path) -> None:
    """Write a folder that `transformers` loads, weights in the type that they have here."""
    decoder = gemma.decoder
    dtype = decoder.embedding.weight.dtype.name
    huggingface_model.write(Path(path), decoder, names(decoder), gemma_config.describe(decoder.config, dtype))
