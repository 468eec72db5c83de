"""Every setting of a run: frozen dataclasses, the presets, and what makes a setting impossible.

`Config` is what `train.py` parses, a run directory saves and `vishwamai_eqx.load` reads back. A field is here because
two runs differ in it. Lengths are in tokens, shares between 0 and 1, `every` in steps.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

AttentionPattern = Literal["full", "window", "blocks"]
Remat = Literal["none", "dots", "full"]
Schedule = Literal["cosine", "wsd"]
Precision = Literal["auto", "f32", "bf16"]
Implementation = Literal["auto", "reference", "xla", "pallas_tpu"]
AXES = ("replica", "data", "expert", "model")
"""Of the mesh, from the slowest wires to the fastest. `replica` divides the batch only, `data` the parameters and the
optimiser state with it; `expert` is as good as `data`, and besides has the experts divided among it; `model` divides
heads, ffn and vocabulary."""
BATCH_AXES = AXES[:3]
"""Those that divide the rows of a batch."""

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
    """What backward computes again: nothing, all but the matrix products, or the whole block."""
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
class Config:
    """A run of `train.py`."""

    preset: str = "tiny"
    """What the other settings default to: tiny, base or large."""
    run_dir: Path | None = None
    """Where the run lives; runs/PRESET if not given. A run that is there is resumed."""
    seed: int = 0
    """Of the parameters, the order of the data, and dropout."""
    mesh: str = "auto"
    """Devices by axis of replica, data, expert and model, such as data=2,expert=2,model=2; auto puts all on data."""
    precision: Precision = "auto"
    """Type of the matrix products; auto: bf16 on accelerators and on CPUs with bf16 instructions, else f32."""
    tokenizer: Path | None = None
    """A SentencePiece model, or a folder with one; none: trained on the data."""
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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)


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


def problems(config: Config, devices: int, platform: str | None = None) -> list[str]:
    """A sentence for each setting that is impossible on so many devices: name, value, constraint, nearest choice.

    `platform` is that of the devices, such as "tpu"; None refuses nothing for it.
    """
    found = []

    def require(name: str, value: Any, holds: bool, constraint: str, fix: Any) -> None:
        if not holds:
            found.append(f"{name}={value!r} must be {constraint}; take {fix}.")

    _alone(require, config, platform)
    # What two settings must be to each other is not asked where one of them can be no number of anything.
    impossible = {sentence.partition("=")[0] for sentence in found}

    def possible(*names: str) -> bool:
        return impossible.isdisjoint(names)

    _together(require, possible, config)
    try:
        sizes = parse_mesh(config.mesh, devices)
    except ValueError as error:
        return [*found, str(error)]
    _on_mesh(require, possible, config, sizes)
    return found


def _alone(require: Callable[..., None], config: Config, platform: str | None) -> None:
    """What each setting must be whatever the others are, or are but for a switch."""
    model, data, optim = config.model, config.data, config.optim
    require("preset", config.preset, config.preset in PRESETS, f"one of {', '.join(PRESETS)}", nearest(config.preset))
    for section in ("model", "optim", "checkpoint", "eval", "guard"):
        settings = getattr(config, section)
        for name, kind in get_type_hints(type(settings)).items():
            if kind is int:
                value = getattr(settings, name)
                # A row of one token has nothing to predict.
                least = {"warmup_steps": 0, "keep_every": 0, "max_seq_len": 2}.get(name, 1)
                require(f"{section}.{name}", value, value >= least, f"at least {least}", max(least, 1))
                require(f"{section}.{name}", value, value < 2**31, "below 2**31", field_default(f"{section}.{name}"))
    for name, value, top in (
        ("data.held_out_share", data.held_out_share, 1),
        ("optim.learning_rate", optim.learning_rate, math.inf),
        ("optim.clip_norm", optim.clip_norm, math.inf),
        ("optim.eps", optim.eps, 1),
    ):
        constraint = "above 0 and " + (f"below {top}" if top < math.inf else "finite")
        require(name, value, 0 < value < top, constraint, field_default(name))
    theta = model.rope_theta
    require("model.rope_theta", theta, 1 <= theta <= 1e30, "at least 1 and at most 1e30", ModelConfig.rope_theta)
    for name, value, top in (
        ("model.dropout_rate", model.dropout_rate, 1),
        ("optim.beta1", optim.beta1, 1),
        ("optim.beta2", optim.beta2, 1),
        ("optim.weight_decay", optim.weight_decay, math.inf),
        ("optim.decay_share", optim.decay_share, math.nextafter(1, 2)),
        ("optim.final_learning_rate_share", optim.final_learning_rate_share, math.nextafter(1, 2)),
        ("optim.balance_loss_weight", optim.balance_loss_weight, math.inf),
        ("optim.router_z_loss_weight", optim.router_z_loss_weight, math.inf),
        ("checkpoint.minutes", config.checkpoint.minutes, math.inf),
        ("guard.hang_minutes", config.guard.hang_minutes, math.inf),
    ):
        limit = {math.inf: "finite", 1: "below 1"}.get(top, "at most 1")
        require(name, value, 0 <= value < top, f"at least 0 and {limit}", field_default(name))
    if data.weights:
        holds = len(data.weights) == len(data.files) and all(0 < weight < math.inf for weight in data.weights)
        require("data.weights", data.weights, holds, f"a number above 0 for each of {len(data.files)} globs", "none")
    for name in ("attention", "experts"):
        value = getattr(model, name)
        holds = value != "pallas_tpu" or platform in (None, "tpu")
        require(f"model.{name}", value, holds, f"an implementation that runs on {platform}", "auto")
    require("seed", config.seed, 0 <= config.seed < 2**31, "at least 0 and below 2**31", 0)
    for name, value in (("loss_spike", config.guard.loss_spike), ("grad_spike", config.guard.grad_spike)):
        name = f"guard.{name}"
        require(name, value, value == 0 or 1 < value < math.inf, "0 or above 1", field_default(name))
    require("topology", config.topology, config.dry_run or not config.topology, "with --dry-run", "--dry-run too")
    require("plan", config.plan, bool(config.topology) or not config.plan, "with --topology", "--topology v3:2x2 too")
    if config.replay is not None:
        require("replay", config.replay, config.replay >= 1, "at least 1", 1)
        require(
            "replay", config.replay, not config.dry_run, "given without dry_run, which computes nothing", "one of them"
        )
    require("json", config.json, config.dry_run or not config.json, "given with dry_run, of which it is a form", "both")
    least = SMALLEST_VOCABULARY if config.tokenizer is None else 1
    require("model.vocab_size", model.vocab_size, not 1 <= model.vocab_size < least, f"at least {least}", least)


def _together(require: Callable[..., None], possible: Callable[..., bool], config: Config) -> None:
    """What settings must be to each other."""
    model, optim = config.model, config.optim
    heads, parts = model.num_heads, optim.microbatches
    if possible("model.hidden_size", "model.num_heads"):
        fitting = divisors(model.hidden_size // 2) if model.hidden_size % 2 == 0 else []
        require(
            "model.num_heads",
            heads,
            heads in fitting,
            f"such that hidden_size={model.hidden_size} gives each head an even width",
            closest(fitting, heads) or "an even hidden_size",
        )
    if possible("model.num_heads", "model.num_kv_heads"):
        require(
            "model.num_kv_heads",
            model.num_kv_heads,
            heads % model.num_kv_heads == 0,
            f"a divisor of num_heads={heads}",
            closest(divisors(heads), model.num_kv_heads),
        )
    if possible("model.experts_per_token", "model.num_experts"):
        require(
            "model.experts_per_token",
            model.experts_per_token,
            model.experts_per_token <= model.num_experts or model.num_experts == 1,
            f"at most num_experts={model.num_experts}",
            model.num_experts,
        )
    if possible("optim.microbatches", "optim.batch_size"):
        require(
            "optim.microbatches",
            parts,
            optim.batch_size % parts == 0,
            f"a divisor of batch_size={optim.batch_size}",
            closest(divisors(optim.batch_size), parts),
        )


def _on_mesh(
    require: Callable[..., None], possible: Callable[..., bool], config: Config, sizes: dict[str, int]
) -> None:
    """What settings must be to the sizes of the mesh."""
    model, optim = config.model, config.optim
    heads, parts = model.num_heads, optim.microbatches
    share, over = math.prod(sizes[axis] for axis in BATCH_AXES), sizes["model"]
    if possible("optim.microbatches", "optim.batch_size") and optim.batch_size % parts == 0:
        require(
            "optim.batch_size",
            optim.batch_size,
            optim.batch_size % (parts * share) == 0,
            f"a multiple of microbatches={parts} times the mesh's {' * '.join(BATCH_AXES)} = {share}",
            max(1, round(optim.batch_size / (parts * share))) * parts * share,
        )
    for name in ("num_heads", "ffn_dim", "vocab_size"):
        if possible(f"model.{name}"):
            value = getattr(model, name)
            fix = f"mesh model={closest(divisors(value), over)}"
            require(f"model.{name}", value, value % over == 0, f"a multiple of the mesh's model={over}", fix)
    if possible("model.num_heads", "model.num_kv_heads"):
        require(
            "model.num_kv_heads",
            model.num_kv_heads,
            model.num_kv_heads % over == 0 or over % model.num_kv_heads == 0,
            f"a multiple or a divisor of the mesh's model={over}",
            closest([*divisors(over), *(over * n for n in divisors(heads))], model.num_kv_heads),
        )
    if possible("model.num_experts"):
        require(
            "model.num_experts",
            model.num_experts,
            model.num_experts % sizes["expert"] == 0 or model.num_experts == 1,
            f"a multiple of the mesh's expert={sizes['expert']}",
            f"mesh expert={closest(divisors(model.num_experts), sizes['expert'])}",
        )


def parse_mesh(spec: str, devices: int) -> dict[str, int]:
    """The size of each mesh axis that `data=8` or `auto` asks for.

    Raises ValueError with a line for each mistake, or if the devices do not suffice.
    """
    if spec == "auto":
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


def field_default(name: str) -> Any:
    """The default of a field, named as on the command line."""
    section, _, item = name.partition(".")
    return getattr(getattr(Config(), section), item) if item else getattr(Config(), section)


def nearest(name: str) -> str:
    """The preset whose name is closest."""
    return next(iter(difflib.get_close_matches(name, PRESETS, 1, 0)), "tiny")


def divisors(value: int) -> list[int]:
    """All of them, in no order."""
    small = [n for n in range(1, math.isqrt(value) + 1) if value % n == 0]
    return [*small, *(value // n for n in small)]


def closest(choices: list[int], value: int) -> int | None:
    """The choice that is nearest to a value."""
    return min(choices, key=lambda choice: abs(choice - value), default=None)
