"""Every setting of a run: frozen dataclasses and the presets.

`Config` is what `train.py` parses, a run directory saves and `vishwamai_eqx.load` reads back. A field is here because
two runs differ in it. Lengths are in tokens, shares between 0 and 1, `every` in steps.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from vishwamai_eqx.gemma_config import GemmaConfig

AttentionPattern = Literal["full", "window", "blocks"]
Remat = Literal["none", "dots", "inputs", "full"]
Schedule = Literal["cosine", "wsd"]
Precision = Literal["auto", "f32", "bf16", "f16", "fp8"]
Fp8Scaling = Literal["block", "tensor", "delayed"]
LossScaling = Literal["auto", "none", "dynamic"]
Implementation = Literal["auto", "reference", "xla", "pallas_tpu"]
AXES = ("replica", "data", "expert", "model")
"""Of the mesh, from the slowest wires to the fastest. `replica` divides the batch only, `data` the parameters and the
optimiser state with it; `expert` is as good as `data`, and besides has the experts divided among it; `model` divides
heads, ffn and vocabulary."""
AUTO_MESH = "auto"
BATCH_AXES = AXES[:3]
"""Those that divide the rows of a batch."""

SHARED_INPUTS = (("query", "key", "value"), ("out",), ("gate", "up"), ("down",))
"""The blocks' weights in groups that are multiplied with the same; the first of each rounds it for all."""

SMALLEST_VOCABULARY = 260
"""A piece for each byte, so that any text can be written, and four special ones."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model; the names are those of `VishwamAI`'s arguments."""

    vocab_size: int = 131_072
    """Pieces of the tokenizer."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_layers: int = 24
    """Blocks of attention and experts."""
    num_heads: int = 12
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    num_experts: int = 8
    """Feed-forward experts a layer; 1 makes a dense layer without a router."""
    experts_per_token: int = 2
    """Experts that a token is sent to."""
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
    attention: Annotated[Implementation, tyro.conf.arg(aliases=["--attention"])] = "auto"
    """Implementation of flash attention; auto takes what is fastest on the backend."""
    experts: Annotated[Implementation, tyro.conf.arg(aliases=["--experts"])] = "auto"
    """Implementation of the experts' dispatch and grouped products; auto takes what is fastest on the backend."""
    rope_theta: float = 10_000.0
    """Base of the rotary positions' wavelengths."""
    tie_embeddings: bool = True
    """Whether the head is the embedding transposed."""
    dropout_rate: float = 0.0
    """Share of attention probabilities dropped while training."""
    remat: Remat = "full"
    """What backward computes again: nothing, all but the matrix products, all but what goes into those with weights, or
    the whole block."""
    scan_unroll: int = 1
    """Layers that one step of the scan over layers holds; all of them is fastest on CPU."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how rows are made of it."""

    files: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--data"], metavar="GLOB...")] = ()
    """Globs of .txt, .md and .py files, a document each, and of .jsonl (also .gz and .zst) and .parquet files, each
    record a document; none: the running Python's standard library."""
    text_column: str = "text"
    """Where the text of a .jsonl or .parquet record is."""
    weights: tuple[float, ...] = ()
    """How much of the training rows each glob gives, relative to the others; none: as much as there is."""
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
    """Steps over which the learning rate rises from 0."""
    schedule: Schedule = "cosine"
    """After warm-up: cosine, or wsd: stable, then linear decay over the last `decay_share` of the steps."""
    decay_share: float = 0.2
    """Share of the steps in which wsd's learning rate falls."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and gains have none."""
    beta1: float = 0.9
    """How much of the gradient's running mean a step keeps."""
    beta2: float = 0.95
    """How much of the squared gradient's running mean a step keeps."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    balance_loss_weight: float = 0.01
    """Weight of the experts' load-balance loss."""
    router_z_loss_weight: float = 0.001
    """Weight of the squared log-partition of the router."""


@dataclass(frozen=True)
class ScalingConfig:
    """How numbers are brought into the reach of narrow formats."""

    fp8: Annotated[Fp8Scaling, tyro.conf.arg(aliases=["--fp8-scaling"])] = "block"
    """What has a scale in fp8: each block of numbers, each tensor by the numbers at hand, or each tensor by the largest
    numbers of its last steps."""
    history: int = 16
    """Steps whose largest numbers make the scales of delayed."""
    skip: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--fp8-skip"])] = ()
    """Weights of the blocks that stay in bf16, of query, key, value, out, gate, up and down; those that share their
    input together. Embedding, head and router always do."""
    loss: LossScaling = "auto"
    """Whether gradients are computed of the loss times a power of two, halved when one is not finite; auto: in f16."""
    loss_start: int = 2**15
    """The first such factor."""
    loss_steps: int = 1000
    """After so many steps taken with a factor it is doubled."""


@dataclass(frozen=True)
class DistillConfig:
    """What a run learns of its `teacher`. A weight is one number, or that of the first step and that of the last."""

    cross_entropy: tuple[float, ...] = (0.5,)
    """Weight of the text itself; where the teacher's tokens end inside, nothing else says what is next."""
    forward: tuple[float, ...] = (1.0,)
    """Weight of the divergence of the student from the teacher's next pieces: of all that the teacher holds likely."""
    reverse: tuple[float, ...] = (0.0,)
    """Weight of the divergence of the teacher from the student's: of what the student holds likely."""
    jensen_shannon: tuple[float, ...] = (0.0,)
    """Weight of the divergence of both from their mixture."""
    beta: float = 0.5
    """The teacher's share of that mixture."""
    temperature: float = 1.0
    """Of both distributions; the terms are multiplied by its square."""
    hidden: tuple[float, ...] = (0.0,)
    """Weight of the angle between what the layers put out, the student's through projections that are learned."""
    attention: tuple[float, ...] = (0.0,)
    """Weight of the divergence of how tokens attend to each other in the last of the layers below."""
    relation_heads: int = 4
    """Parts that queries, keys and values are cut into for it, in both models."""
    student_layers: tuple[int, ...] = ()
    """The student's layers, from 1, that are held beside `teacher_layers`; none: the ends of four equal parts."""
    teacher_layers: tuple[int, ...] = ()
    """The teacher's layers, one for each of `student_layers`."""
    on_policy: int = 0
    """Each so many steps one learns what the teacher says of text that the student writes; 0: none does."""
    inherit: bool = False
    """Begin with the teacher's embeddings of the student's pieces, in the dimensions in which they differ most."""
    targets: Path | None = None
    """Where `vishwamai_eqx.draw_targets` has put what the teacher says of the run's batches; none: it is asked."""
    draws: int = 16
    """Pieces drawn there for each of the teacher's tokens."""

    @property
    def of_pieces(self) -> bool:
        """Whether the teacher's next pieces are learned, which only a tokenizer that is cut from its own has."""
        return any(self.forward + self.reverse + self.jensen_shannon)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int = 500
    """Steps between saves."""
    minutes: float = 0.0
    """Save too when so many minutes have gone by since the last one; 0: never for that."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of so many steps are kept for good; 0: none."""


@dataclass(frozen=True)
class GuardConfig:
    """When a step is not taken, and when a run counts as hanging."""

    loss_spike: float = 3.0
    """A step whose loss is beyond so many times its running mean is skipped; 0: only what is not finite is."""
    grad_spike: float = 10.0
    """The same of the gradient's global norm, before it is clipped."""
    patience: int = 5
    """After so many skipped steps in a row the run goes back to its last checkpoint, and on with the next batch."""
    hang_minutes: float = 15.0
    """Without a step for so long, what every thread does is written to the run directory; 0: never."""


@dataclass(frozen=True)
class EvalConfig:
    """What is looked at while the run goes on."""

    every: int = 500
    """Steps between evaluations."""
    rows: int = 256
    """Held-out rows of an evaluation during the run; the last one reads them all."""
    sample_every: int = 1000
    """Steps between samples of the model's own text."""
    sample_tokens: int = 128
    """Tokens of a sample of the model's own text."""
    samples: int = 32
    """Samples that are written at a time, during the run and at its end."""


@dataclass(frozen=True)
class ProcessesConfig:
    """The processes that are one run, each started with the same command but for its index."""

    address: str | None = None
    """HOST:PORT where process 0 listens for the others; auto asks the TPU pod or Slurm, count and index too."""
    count: int | None = None
    """How many processes there are."""
    index: int | None = None
    """Which of them this one is, from 0."""


@dataclass(frozen=True)
class Config:
    """A run of `train.py`."""

    preset: str = "tiny"
    """What the other settings default to: tiny, base or large."""
    run_dir: Path | None = None
    """Where the run lives; runs/PRESET if not given. A run that is there is resumed."""
    seed: int = 0
    """Of the parameters, the order of the data, and dropout."""
    mesh: str = AUTO_MESH
    """Devices by axis of replica, data, expert and model, such as data=2,expert=2,model=2; auto puts all on data, and
    on expert or model too where a step would not fit so."""
    offload: bool = False
    """Keep the optimiser's state in the hosts' memory and fetch it for each update; on v2 and v3 it saves nothing."""
    precision: Precision = "auto"
    """Type of the matrix products; auto: bf16 on accelerators and on CPUs with bf16 instructions, else f32. f16 is none
    of TPUs'."""
    init: Path | None = None
    """A Gemma folder of Hugging Face to fine-tune: its model, weights and tokenizer; none: VishwamAI, untrained."""
    gemma: Annotated[GemmaConfig | None, tyro.conf.Suppress] = None
    """The shape of what `init` holds, of which `model` repeats what it has a name for."""
    teacher: Path | None = None
    """A Gemma folder, a run or an export to distil: the run's tokenizer is the teacher's with fewer merges."""
    tokenizer: Path | None = None
    """A SentencePiece model, or a folder with one; none: trained on the data, or cut from the teacher's."""
    dry_run: bool = False
    """Print what the run would be, allocate nothing, and stop."""
    topology: str | None = None
    """TPUs that a dry run compiles the step for, none needed: v3:2x2, v5e:2x4, tpu7x:2x2x1 ..., the chips by axis."""
    plan: bool = False
    """Let the dry run look for microbatches and remat policy by a hand estimate, and compile the best."""
    json: bool = False
    """Print the dry run as one JSON object."""
    replay: int | None = None
    """Do this step of the run again, from the checkpoint before it, and say whether it comes out as logged."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)


PRESETS: dict[str, Config] = {
    # Learns something to look at within minutes on two CPU cores, with every part switched on.
    "tiny": Config(
        preset="tiny",
        model=ModelConfig(
            vocab_size=8192,
            hidden_size=128,
            num_layers=4,
            num_heads=2,
            num_kv_heads=1,
            ffn_dim=192,
            max_seq_len=256,
            remat="none",
            scan_unroll=4,
        ),
        optim=OptimConfig(
            steps=500,
            batch_size=8,
            learning_rate=4e-3,
            final_learning_rate_share=0.05,
            warmup_steps=40,
            schedule="wsd",
            decay_share=0.4,
        ),
        checkpoint=CheckpointConfig(every=250),
        eval=EvalConfig(every=250, rows=64, sample_every=250),
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

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: Any) -> Config:
    """The configuration that `to_dict` made the values of; ValueError if they are not one's."""

    def made(kind: type, values: Any) -> Any:
        hints = get_type_hints(kind)
        if not isinstance(values, dict) or values.keys() != hints.keys():
            raise ValueError(f"not a configuration of this version: {kind.__name__} has other settings")
        return kind(**{name: read(hint, name, values[name]) for name, hint in hints.items()})

    def read(hint: Any, name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(hint):
            return made(hint, value)  # pyright: ignore[reportArgumentType]
        choices = set(get_args(hint)) if get_origin(hint) in (UnionType, Literal) else {hint}
        if value is None and type(None) in choices:
            return None
        if parts := [choice for choice in choices if dataclasses.is_dataclass(choice)]:
            return made(parts[0], value)
        if Path in choices and isinstance(value, str):
            return Path(value)
        if get_origin(hint) is tuple and isinstance(value, list):
            return tuple(read(get_args(hint)[0], name, item) for item in value)
        if get_origin(hint) is Literal and isinstance(value, str) and value in choices:
            return value
        if type(value) in choices or (hint is float and type(value) is int):
            return hint(value) if hint is float else value
        raise ValueError(f"not a configuration of this version: {name}={value!r} is no value of this setting")

    return made(Config, values)


def parse_mesh(spec: str, devices: int) -> dict[str, int]:
    """The size of each mesh axis that `data=8` asks for, or `auto`, which is all of them on `data`.

    Raises ValueError with a line for each mistake, or if the devices do not suffice.
    """
    if spec == AUTO_MESH:
        return dict.fromkeys(AXES, 1) | {"data": devices}
    sizes: dict[str, int] = {}
    mistakes = []
    for part in spec.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not (size.isascii() and size.isdecimal()) or int(size) < 1:
            mistakes.append(
                f"mesh={spec!r}: {part!r} must be AXIS=SIZE with an axis of {', '.join(AXES)}; take data={devices}."
            )
        elif name in sizes:
            mistakes.append(
                f"mesh={spec!r} must name each axis once and names {name} again; take {name}={sizes[name]}."
            )
        else:
            sizes[name] = int(size)
    if mistakes:
        raise ValueError("\n".join(dict.fromkeys(mistakes)))
    needed = math.prod(sizes.values())
    if needed > devices:
        raise ValueError(
            f"mesh={spec!r} must be of at most the {devices} devices there are and needs {needed}; take data={devices}."
        )
    return dict.fromkeys(AXES, 1) | sizes


def nearest(name: str) -> str:
    """The preset whose name is closest."""
    return next(iter(difflib.get_close_matches(name, PRESETS, 1, 0)), "tiny")
