"""What a token costs, counted by hand, and what a chip can do."""

import dataclasses

from kernels.tpu import GENERATIONS
from vishwamai_eqx import teacher
from vishwamai_eqx.config import Config

# Dense bf16 FLOP/s of a device as jax counts devices, by its device_kind.
PEAK_FLOPS = {
    **{it.device_kind: it.peak_flops for it in GENERATIONS.values()},
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def head_dim(config: Config) -> int:
    """Width of a head."""
    return config.gemma.head_dim if config.gemma else config.model.hidden_size // config.model.num_heads


def parameters(config: Config) -> tuple[int, int]:
    """Parameters in all, and those that one token meets."""
    model, gemma = config.model, config.gemma
    d = model.hidden_size
    attention = 2 * d * (model.num_heads + model.num_kv_heads) * head_dim(config)
    router = d * model.num_experts if model.num_experts > 1 else 0
    if gemma is None:
        norms, last = 2 * 2 * d, 2 * d
    else:
        norms, last = (4 if gemma.has_post_norms else 2) * d + 2 * gemma.has_qk_norm * gemma.head_dim, d
    expert = 3 * d * model.ffn_dim
    outside = model.vocab_size * d * (1 if model.tie_embeddings else 2) + last
    total, active = (
        model.num_layers * (attention + router + norms + experts * expert) + outside
        for experts in (model.num_experts, min(model.experts_per_token, model.num_experts))
    )
    return total, active


def keys_seen(config: Config) -> float:
    """Keys that a query sees on average, over the layers too."""
    model, length = config.model, config.model.max_seq_len

    def within(window: int) -> float:
        """Fewer at the beginning of a row, where there is no whole window yet."""
        window = min(window, length)
        return window - window * window / (2 * length)

    if config.gemma is not None:
        window, kinds = config.gemma.sliding_window, config.gemma.layer_types
        return sum(within(window if kind == "sliding_attention" else length) for kind in kinds) / len(kinds)
    if model.attention_pattern == "window":
        return within(model.window)
    if model.attention_pattern == "blocks" and length > 2 * model.attention_block:
        # Half of its own block, the one before and the first; in the first block and the second there is less.
        return 2.5 * model.attention_block - 3 * model.attention_block**2 / length
    return length / 2


def attended(config: Config) -> float:
    """FLOPs of a token's scores, or of the values that it takes, over all layers."""
    model = config.model
    return 2 * model.num_layers * model.num_heads * head_dim(config) * keys_seen(config)


def per_token(config: Config) -> float:
    """FLOPs of forward and backward for a token: 6 for each active parameter in a matrix product, and attention's.

    Scores and values take 12 * heads * head_dim FLOPs for each key that a query sees, on average half a row under the
    causal mask (2204.02311, appendix B). What remat computes again is not counted: this is the model's work.
    """
    model, (_, active) = config.model, parameters(config)
    # A tied embedding is a matrix product once, as the head; an untied one besides is a look-up.
    lookup = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    return 6 * (active - lookup) + 6 * attended(config)


def of_teacher(config: Config) -> float:
    """FLOPs of the teacher's forward pass for a token of a row as long as the student's, if it is asked."""
    if config.teacher is None or config.distill.targets is not None:
        return 0.0
    theirs = teacher.configuration(config.teacher)
    model = dataclasses.replace(theirs.model, max_seq_len=config.model.max_seq_len)
    return per_token(dataclasses.replace(theirs, model=model)) / 3
