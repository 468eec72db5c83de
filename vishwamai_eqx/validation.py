"""What makes a setting impossible: each in a sentence with name, value, constraint and the nearest choice."""

import math
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

from vishwamai_eqx import flops, teacher
from vishwamai_eqx.config import (
    BATCH_AXES,
    PRESETS,
    SHARED_INPUTS,
    SMALLEST_VOCABULARY,
    Config,
    ModelConfig,
    ScalingConfig,
    nearest,
    parse_mesh,
)
from vishwamai_eqx.factors import closest, divisors
from vishwamai_eqx.projections import layer_pairs


def problems(config: Config, devices: int, platform: str | None = None, processes: int = 1) -> list[str]:
    """A sentence for each setting that is impossible on so many devices: name, value, constraint, nearest choice.

    `platform` is that of the devices, such as "tpu"; None refuses nothing for it. Each of several `processes` has some
    of the devices.
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
    _of_gemma(require, config)
    their = None
    if config.teacher is not None:
        try:
            their = teacher.configuration(config.teacher)
            _of_teacher(require, config, their)
        except ValueError as error:
            found.append(str(error))
    try:
        sizes = parse_mesh(config.mesh, devices)
    except ValueError as error:
        return [*found, str(error)]
    _on_mesh(require, possible, config, sizes)
    if their is not None:
        rows, over = their.model.vocab_size, sizes["model"]
        if any(config.distill.attention):
            for name, parts in (("relation heads", config.distill.relation_heads), *_kv_heads(config, their)):
                constraint = f"0 unless the mesh's model={over} divides the {parts} {name}"
                require("distill.attention", config.distill.attention, parts % over == 0, constraint, 0)
        fix = f"mesh model={closest(divisors(rows), over)}"
        require("teacher", str(config.teacher), rows % over == 0, f"of rows that the mesh's model={over} divides", fix)
    used = math.prod(sizes.values())
    require(
        "mesh",
        config.mesh,
        processes == 1 or used == devices,
        f"of all {devices} devices of the {processes} processes",
        f"data={devices}",
    )
    return found


def _alone(require: Callable[..., None], config: Config, platform: str | None) -> None:
    """What each setting must be whatever the others are, or are but for a switch."""
    model, data, optim = config.model, config.data, config.optim
    require("preset", config.preset, config.preset in PRESETS, f"one of {', '.join(PRESETS)}", nearest(config.preset))
    for section in ("model", "optim", "scaling", "checkpoint", "eval", "guard"):
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
    require("precision", config.precision, config.precision != "f16" or platform != "tpu", "a type of TPUs", "bf16")
    factor = config.scaling.loss_start
    power = factor >= 1 and factor & (factor - 1) == 0 and factor <= 2**24
    require("scaling.loss_start", factor, power, "a power of two from 1 to 2**24", ScalingConfig.loss_start)
    for name in ("fp8", "skip"):
        value, default = getattr(config.scaling, name), getattr(ScalingConfig, name)
        holds = config.precision == "fp8" or value == default
        require(f"scaling.{name}", value, holds, "left alone but in fp8", "--precision fp8 too")
    weights, skip = [name for group in SHARED_INPUTS for name in group], config.scaling.skip
    require("scaling.skip", skip, set(skip) <= set(weights), f"of {', '.join(weights)}", "a name of these")
    for group in SHARED_INPUTS:
        chosen = set(group) & set(skip)
        together = "all of those with one input, or none"
        require("scaling.skip", skip, not chosen or chosen == set(group), together, " ".join(group))
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
    if possible("model.hidden_size", "model.num_heads") and config.gemma is None:
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


def _of_gemma(require: Callable[..., None], config: Config) -> None:
    """What a run that fine-tunes has from the folder that it began with."""
    if config.gemma is None:
        return
    for name, value in config.gemma.model_settings.items():
        found = getattr(config.model, name)
        require(f"model.{name}", found, found == value, f"{value!r}, as in {config.init}", "another folder or none")
    longest, length = config.gemma.max_position_embeddings, config.model.max_seq_len
    require("model.max_seq_len", length, length <= longest, f"at most the {longest} of {config.init}", longest)


def _of_teacher(require: Callable[..., None], config: Config, their: Config) -> None:
    """What a run must be to the model that it distils."""
    assert config.teacher is not None
    distill, folder = config.distill, str(config.teacher)
    require(
        "teacher", folder, config.dry_run or config.teacher.exists(), "a folder outside of dry runs", "--dry-run too"
    )
    require(
        "teacher", folder, config.init is None, "given without init, which has a vocabulary of its own", "one of them"
    )
    length, longest = config.model.max_seq_len, their.model.max_seq_len
    require("model.max_seq_len", length, length <= longest, f"at most the {longest} of the teacher", longest)
    pieces, most = config.model.vocab_size, their.model.vocab_size
    holds = pieces <= most or not distill.of_pieces
    require("model.vocab_size", pieces, holds, f"at most the {most} of the teacher, of which they are", most)
    for name in ("cross_entropy", "forward", "reverse", "jensen_shannon", "hidden", "attention"):
        values = getattr(distill, name)
        holds = len(values) in (1, 2) and all(0 <= value < math.inf for value in values)
        require(f"distill.{name}", values, holds, "one weight of at least 0, or a first and a last one", "1")
    learns = distill.of_pieces or any(distill.hidden + distill.attention)
    require("distill.forward", distill.forward, learns, "above 0 where nothing else is learned of the teacher", 1)
    pairs = len(distill.student_layers), len(distill.teacher_layers)
    require("distill.teacher_layers", distill.teacher_layers, pairs[0] == pairs[1], f"{pairs[0]} layers", "as many")
    for name, model in (("student", config.model), ("teacher", their.model)):
        layers, last = getattr(distill, f"{name}_layers"), model.num_layers
        holds = all(1 <= layer <= last for layer in layers)
        require(f"distill.{name}_layers", layers, holds, f"from 1 to the {last} that there are", last)
    if any(distill.attention) and pairs[0] == pairs[1]:
        heads, widths = distill.relation_heads, [it * flops.head_dim(of) for of in (config, their) for it in _heads(of)]
        common = divisors(math.gcd(*widths))
        constraint = f"a divisor of the queries' and keys' widths, {', '.join(map(str, widths))}"
        require("distill.relation_heads", heads, heads in common, constraint, closest(common, heads))
        last = layer_pairs(distill, config.model.num_layers, their.model.num_layers)[-1]
        require("distill.attention", distill.attention, min(last) > 1, "0 where the last of the layers is the first", 0)
    steps = distill.on_policy
    require("distill.on_policy", steps, steps >= 0, "at least 0", 0)
    holds = distill.targets is None or steps == 0
    require("distill.on_policy", steps, holds, "0 with distill.targets, of texts that are there before", 0)
    drawn = ("reverse", "jensen_shannon", "hidden", "attention") if distill.targets is not None else ()
    for name in drawn:
        values = getattr(distill, name)
        require(f"distill.{name}", values, not any(values), "0 with distill.targets, which are drawn for forward", 0)
    if distill.targets is not None:
        require("distill.temperature", distill.temperature, distill.temperature == 1, "1 with distill.targets", 1)
        require("distill.forward", distill.forward, any(distill.forward), "above 0 with distill.targets", 1)
        require("distill.inherit", distill.inherit, not distill.inherit, "left out with distill.targets", "one of them")
    holds = distill.of_pieces or not distill.inherit
    require(
        "distill.inherit",
        distill.inherit,
        holds,
        "left out where the teacher's pieces are not learned",
        "--distill.forward 1 too",
    )
    require("distill.draws", distill.draws, distill.draws >= 1, "at least 1", field_default("distill.draws"))
    require("distill.beta", distill.beta, 0 < distill.beta < 1, "above 0 and below 1", field_default("distill.beta"))
    holds = 0 < distill.temperature < math.inf
    require("distill.temperature", distill.temperature, holds, "above 0 and finite", 1)


def _kv_heads(student: Config, teacher: Config) -> Iterator[tuple[str, int]]:
    return (
        (f"key and value heads of the {name}", of.model.num_kv_heads)
        for name, of in (("student", student), ("teacher", teacher))
    )


def _heads(config: Config) -> tuple[int, int]:
    return config.model.num_heads, config.model.num_kv_heads


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


def field_default(name: str) -> Any:
    """The default of a field, named as on the command line."""
    section, _, item = name.partition(".")
    return getattr(getattr(Config(), section), item) if item else getattr(Config(), section)
