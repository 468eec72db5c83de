"""Every setting of a run: frozen dataclasses, the presets, and what makes a setting impossible.

`Config` is what `train.py` parses, a run directory saves and `vishwamai_eqx.load` reads back. A field is here because
two runs differ in it. Lengths are in tokens, shares between 0 and 1, `every` in steps.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

AttentionPattern = Literal["full", "window", "blocks"]
Remat = Literal["none", "dots", "full"]
Schedule = Literal["cosine", "wsd"]
Precision = Literal["auto", "f32", "bf16"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model; the names are those of `VishwamAI`'s arguments."""

    vocab_size: int = 131_072
    """Pieces of the tokenizer."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_layers: int = 24
    num_heads: int = 12
    num_kv_heads: int = 4
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    num_experts: int = 8
    """Feed-forward experts a layer; 1 makes a dense layer without a router."""
    experts_per_token: int = 2
    ffn_dim: int = 3072
    """Width of one expert."""
    max_seq_len: int = 2048
    """Tokens of a training row, and the longest context of generation."""
    attention_pattern: AttentionPattern = "full"
    """What a query sees of its past: all of it, the last `window` tokens, or block-sparse: its own and the previous
    block of `attention_block`, and the first block of the row."""
    window: int = 512
    """Tokens that a query sees, itself included, when attention_pattern is window."""
    attention_block: int = 128
    """Tokens of a block when attention_pattern is blocks."""
    attention: Annotated[Literal["auto", "reference", "xla"], tyro.conf.arg(aliases=["--attention"])] = "auto"
    """Implementation of flash attention; auto takes what is fastest on the backend."""
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True
    """Whether the head is the embedding transposed."""
    dropout_rate: float = 0.0
    """Share of attention probabilities dropped while training."""
    remat: Remat = "full"
    """What backward computes again: nothing, all but the matrix products, or the whole block."""
    scan_unroll: int = 1
    """Layers that one step of the scan over layers holds; all of them is fastest on CPU."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how rows are made of it."""

    files: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--data"], metavar="GLOB...")] = ()
    """Globs of .txt, .md and .py files, one document each; none: the running Python's standard library."""
    held_out_share: float = 0.05
    """Share of the text's bytes, in whole documents, that training never sees."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and the batch."""

    steps: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 10_000
    """Optimiser steps of the whole run."""
    batch_size: int = 256
    """Rows a step, over all devices and microbatches."""
    microbatches: int = 1
    """Parts that a step's batch is accumulated over."""
    learning_rate: float = 6e-4
    """Peak of the schedule."""
    final_learning_rate_share: float = 0.1
    """The schedule's last learning rate as a share of the peak."""
    warmup_steps: int = 500
    schedule: Schedule = "cosine"
    """After warm-up: cosine, or wsd: stable, then linear decay over the last `decay_share` of the steps."""
    decay_share: float = 0.2
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and gains have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    balance_loss_weight: float = 0.01
    """Weight of the experts' load-balance loss."""
    router_z_loss_weight: float = 0.001
    """Weight of the squared log-partition of the router."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int = 500
    minutes: float = 0.0
    """Save too when so many minutes have gone by since the last one; 0: never for that."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of so many steps are kept for good; 0: none."""


@dataclass(frozen=True)
class EvalConfig:
    """What is looked at while the run goes on."""

    every: int = 500
    rows: int = 256
    """Held-out rows of an evaluation during the run; the last one reads them all."""
    sample_every: int = 1000
    sample_tokens: int = 64
    """Tokens of a sample during the run."""


@dataclass(frozen=True)
class Config:
    """A run of `train.py`."""

    preset: str = "tiny"
    """What the other settings default to: tiny, base or large."""
    run_dir: Path | None = None
    """Where the run lives; runs/PRESET if not given. A run that is there is resumed."""
    seed: int = 0
    mesh: str = "auto"
    """Devices by axis, such as data=8; auto puts all of them on data."""
    precision: Precision = "auto"
    """Type of the matrix products; auto: bf16 on accelerators and on CPUs with bf16 instructions, else f32."""
    tokenizer: Path | None = None
    """A SentencePiece model, or a folder with one; none: trained on the data."""
    dry_run: bool = False
    """Print what the run would be, allocate nothing, and stop."""
    json: bool = False
    """Print the dry run as one JSON object."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


PRESETS: dict[str, Config] = {
    # Learns something to look at within minutes on two CPU cores, with every part switched on.
    "tiny": Config(
        preset="tiny",
        model=ModelConfig(
            vocab_size=4096,
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            ffn_dim=384,
            max_seq_len=256,
            remat="none",
            scan_unroll=4,
        ),
        optim=OptimConfig(steps=600, batch_size=16, learning_rate=3e-3, warmup_steps=50, schedule="wsd"),
        checkpoint=CheckpointConfig(every=200),
        eval=EvalConfig(every=200, rows=64, sample_every=200),
    ),
    "base": Config(preset="base"),
    "large": Config(
        preset="large",
        model=ModelConfig(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=16_384),
        optim=OptimConfig(learning_rate=3e-4),
    ),
}


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON-ready values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(config).items()}
