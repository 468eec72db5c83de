"""What a token costs, counted by hand, and what a chip can do."""

from kernels.tpu import GENERATIONS
from vishwamai_eqx.config import ModelConfig

# Dense bf16 FLOP/s of a device as jax counts devices, by its device_kind.
PEAK_FLOPS = {
    **{it.device_kind: it.peak_flops for it in GENERATIONS.values()},
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters in all, and those that one token meets."""
    d, head_dim = config.hidden_size, config.hidden_size // config.num_heads
    attention = 2 * d * d + 2 * d * config.num_kv_heads * head_dim
    router = d * config.num_experts if config.num_experts > 1 else 0
    norms = 2 * 2 * d
    expert = 3 * d * config.ffn_dim
    outside = config.vocab_size * d * (1 if config.tie_embeddings else 2) + 2 * d
    total, active = (
        config.num_layers * (attention + router + norms + experts * expert) + outside
        for experts in (config.num_experts, min(config.experts_per_token, config.num_experts))
    )
    return total, active


def keys_seen(config: ModelConfig) -> float:
    """Keys that a query sees on average."""
    seen = config.max_seq_len / 2
    if config.attention_pattern == "window":
        seen = min(seen, config.window)
    if config.attention_pattern == "blocks":
        seen = min(seen, 2.5 * config.attention_block)
    return seen


def per_token(config: ModelConfig) -> float:
    """FLOPs of forward and backward for a token: 6 for each active parameter in a matrix product, and attention's.

    Scores and values take 12 * hidden_size FLOPs for each key that a query sees, on average half a row under the
    causal mask (2204.02311, appendix B). What remat computes again is not counted: this is the model's work.
    """
    seen = keys_seen(config)
    _, active = parameters(config)
    # A tied embedding is a matrix product once, as the head; an untied one besides is a look-up.
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    return 6 * (active - lookup) + 12 * config.num_layers * config.hidden_size * seen
