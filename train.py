"""Train VishwamAI: text -> tokens -> packed rows -> one jitted step over a mesh -> metrics, samples, checkpoints.

    python train.py                                       preset tiny on the Python standard library, in minutes
    python train.py --preset base --data 'corpus/*.txt'   your text
    python train.py --run-dir runs/tiny                   go on where that run stopped

The same script runs on one CPU core and on a mesh of TPU chips: one device is the mesh of one.
"""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import vishwamai_eqx  # noqa: F401  isort: skip  (before jax, whose platform it chooses)
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vishwamai_eqx import command_line, data, evaluation, flops, optim, parameters, state
from vishwamai_eqx.checkpoint import Checkpoints
from vishwamai_eqx.config import Config, parse_mesh, problems, to_dict
from vishwamai_eqx.data import Batch
from vishwamai_eqx.feed import Feed
from vishwamai_eqx.guard import Signals
from vishwamai_eqx.logbook import Logbook
from vishwamai_eqx.loss import cross_entropy
from vishwamai_eqx.mesh import gather, make_mesh
from vishwamai_eqx.model import VishwamAI
from vishwamai_eqx.precision import compute_dtype
from vishwamai_eqx.state import TrainState
from vishwamai_eqx.tokenizer import VishwamAITokenizer

P = PartitionSpec
ROWS = P("data")  # of [rows, seq]
MICROBATCHES = P(None, "data")  # of [microbatches, rows, seq]


class Metrics(eqx.Module):
    """What a step says of itself, the same on every device."""

    loss: Float[Array, ""]
    """Cross-entropy in nats a token."""
    balance: Float[Array, ""]
    router_z: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    tokens: Int[Array, ""]
    load: Float[Array, "layers experts"] | None
    """Each expert's share of its layer's choices."""
    batch: UInt32[Array, "2"]
    """The two halves of the batch's hash."""


def make_step(
    config: Config, mesh: Mesh, specs: TrainState, transform: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The training step: gradients summed over microbatches and devices, clipped, through optax."""
    schedule = optim.learning_rate(config.optim)

    def loss(model: VishwamAI, batch: Batch, tokens: Array, key: Array | None, first_row: Array) -> tuple[Array, Any]:
        """A microbatch's part of the step's loss: sums over its rows, divided by what the whole step has."""
        hidden, _, router = model(
            batch.tokens,
            segment_ids=batch.segment_ids,
            positions=batch.positions,
            key=key,
            placement=specs.model,
            first_row=first_row,
        )
        nll = token_loss(model, specs.model, hidden, batch) / tokens
        if router is None:
            return nll, (nll, jnp.zeros(()), jnp.zeros(()), None)
        router = jax.lax.psum(router, "data")
        balance, z = (rows.mean() / config.optim.batch_size for rows in (router.balance, router.z))
        total = nll + config.optim.balance_loss_weight * balance + config.optim.router_z_loss_weight * z
        return total, (nll, balance, z, router.load)

    def step(current: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens = jax.lax.psum((batch.segment_ids > 0).sum(dtype=jnp.float32), "data")
        key = jax.random.fold_in(jax.random.key(config.seed), current.step) if config.model.dropout_rate else None
        microbatches, rows = batch.tokens.shape[:2]

        # Nobody sums gradients over devices here. The loss is a sum over them already, and its transpose hands each
        # device the gradient of its own shards, complete: scattered for what was gathered, summed for what was copied.
        def accumulate(gradients: VishwamAI, xs: tuple[Batch, Array]) -> tuple[VishwamAI, Any]:
            part, index = xs
            first_row = (index * jax.lax.axis_size("data") + jax.lax.axis_index("data")) * rows
            more, metrics = jax.grad(loss, has_aux=True)(current.model, part, tokens, key, first_row)
            return jax.tree.map(jnp.add, gradients, more), metrics

        zeros = jax.tree.map(jnp.zeros_like, current.model)
        gradients, metrics = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(microbatches)))
        nll, balance, z, load = jax.tree.map(lambda parts: parts.sum(axis=0), metrics)

        norm = optim.global_norm(gradients, specs.model)
        gradients = optim.clip(gradients, norm, config.optim.clip_norm)
        updates, opt_state = transform.update(gradients, current.opt_state, current.model)
        model = optax.apply_updates(current.model, updates)
        metrics = Metrics(
            loss=nll,
            balance=balance,
            router_z=z,
            grad_norm=norm,
            learning_rate=jnp.asarray(schedule(current.step)),
            tokens=tokens.astype(jnp.int32),
            load=None if load is None else load / load.sum(axis=-1, keepdims=True),
            batch=jax.lax.psum(
                data.hash_lanes(jax.tree.map(lambda rows: rows.reshape(-1, rows.shape[-1]), batch)), "data"
            ),
        )
        return TrainState(model, opt_state, current.step + 1), metrics  # pyright: ignore[reportArgumentType]

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(specs, MICROBATCHES), out_specs=(specs, P()), check_vma=True)
    return jax.jit(sharded, donate_argnums=0)


def make_evaluate(mesh: Mesh, specs: VishwamAI) -> Callable[[VishwamAI, Batch], tuple[Array, Array]]:
    """The sum of the cross-entropy in nats over a batch, and its tokens."""

    def evaluate(model: VishwamAI, batch: Batch) -> tuple[Array, Array]:
        hidden, _, _ = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, placement=specs)
        return token_loss(model, specs, hidden, batch), jax.lax.psum((batch.segment_ids > 0).sum(), "data")

    return jax.jit(jax.shard_map(evaluate, mesh=mesh, in_specs=(specs, ROWS), out_specs=(P(), P()), check_vma=True))


def token_loss(model: VishwamAI, specs: VishwamAI, hidden: Array, batch: Batch) -> Array:
    """The sum of the cross-entropy over the tokens of all devices."""
    head = gather(model.head_weight, specs.head_weight, hidden.dtype)
    real = (batch.segment_ids > 0).astype(jnp.float32)
    with jax.named_scope("cross_entropy"):
        return jax.lax.psum(cross_entropy(hidden, head.weight, batch.targets, real), "data")


def read_tokenizer(config: Config, corpus: data.Corpus) -> VishwamAITokenizer:
    """The run's tokenizer, trained at the first start."""
    assert config.run_dir is not None
    folder = config.run_dir / "tokenizer"
    if (folder / "tokenizer.model").exists():
        tokenizer = VishwamAITokenizer(folder)
    elif config.tokenizer is not None:
        tokenizer = VishwamAITokenizer(config.tokenizer)
        tokenizer.save(folder)
    else:
        tokenizer = data.train_tokenizer(corpus, config.model.vocab_size, folder)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be the {tokenizer.vocab_size} pieces of the tokenizer in "
            f"{config.tokenizer or folder}; take --model.vocab-size {tokenizer.vocab_size}."
        )
    return tokenizer


def train(config: Config, console: Console) -> int:
    """Run to the last step, or to a signal; the exit code."""
    assert config.run_dir is not None
    corpus = data.load_documents(config.data, config.seed)
    tokenizer = read_tokenizer(config, corpus)
    command_line.write_config(config)

    sizes = parse_mesh(config.mesh, jax.device_count())
    mesh, transform, dtype = make_mesh(sizes), optim.optimizer(config.optim), compute_dtype(config.precision)
    abstract = state.abstract_state(config.model, dtype, transform)
    specs = state.placement(abstract, sizes, transform)
    shardings = state.shardings(mesh, specs)
    abstract = jax.tree.map(placed, abstract, shardings)
    steps, microbatches, length = config.optim.steps, config.optim.microbatches, config.model.max_seq_len
    rows = config.optim.batch_size // microbatches
    held_out, fed = NamedSharding(mesh, ROWS), NamedSharding(mesh, MICROBATCHES)
    # The step needs no more than shapes: it is compiled while text is tokenized and parameters are drawn.
    lowered = make_step(config, mesh, specs, transform).lower(abstract, abstract_batch(fed, microbatches, rows, length))
    compiling = ThreadPoolExecutor(1).submit(lowered.compile)
    dataset = data.prepare(corpus, tokenizer, seq_len=length, batch_size=config.optim.batch_size, seed=config.seed)
    evaluate = make_evaluate(mesh, specs.model)
    kind = jax.devices()[0].device_kind
    total, active = flops.parameters(config.model)
    console.print(
        f"{config.run_dir}: {total:,} parameters, {active:,} active, in {dtype} on {mesh.size} {kind}\n"
        f"{steps} steps of {config.optim.batch_size} rows of {config.model.max_seq_len} tokens; "
        f"an epoch is {dataset.batches_per_epoch:,.0f} steps",
        highlight=False,
    )

    with (
        Signals() as signals,
        Logbook(config.run_dir, configuration=to_dict(config)) as log,
        Checkpoints(
            config.run_dir / "checkpoints",
            every=config.checkpoint.every,
            keep=config.checkpoint.keep,
            configuration=to_dict(config),
            on_event=log.event,
        ) as checkpoints,
        progress(console) as bar,
    ):

        def look(step: int, model: VishwamAI, limit: int | None) -> evaluation.HeldOut:
            result = evaluation.held_out(evaluate, model, dataset, held_out, rows, limit)
            log.eval(step=step, **result._asdict())
            bar.console.print(
                f"step {step}: held-out loss {result.loss:.3f}, bits per byte {result.bits_per_byte:.3f}",
                highlight=False,
            )
            return result

        def write(step: int, model: VishwamAI) -> list[str]:
            # As many during the run as at its end, so that one program writes both.
            tokens = min(config.eval.sample_tokens, length - 1)
            texts = evaluation.write(model, tokenizer, tokens=tokens, seed=step, samples=config.eval.samples)
            for text in texts:
                log.sample(step, text)
            return texts

        current = checkpoints.restore(abstract) or state.initialise(
            config.model, dtype, transform, config.seed, shardings
        )
        step, first = compiling.result(), int(current.step)
        log.resume(first)
        log.event("start", f"from step {first} on {mesh.size} {kind}, {sizes}", step=first)

        feed = Feed(dataset, range(first, steps), fed, microbatches=microbatches)
        task = bar.add_task("", total=steps, completed=first, note="")
        speed = Speed(config, kind, mesh.size)
        for n, batch in enumerate(feed, first + 1):
            current, metrics = step(current, batch)
            log.step(step=n, data_seconds=feed.waited, **speed(metrics))
            bar.update(task, completed=n, note=speed.note)
            if metrics.load is not None and n % 10 == 0:
                log.experts(n, metrics.load)
            if n % config.eval.every == 0 and n < steps:
                look(n, current.model, config.eval.rows)
            if n % config.eval.sample_every == 0 and n < steps:
                bar.console.print(write(n, current.model)[0], style="dim", markup=False, highlight=False)
            if checkpoints.due(n) or signals.received or n == steps:
                checkpoints.save(n, current)
            if signals.received:
                checkpoints.wait()
                log.event("signal", f"{signals.received.name}: saved and stopped", step=n)
                console.print(f"{signals.received.name}: step {n} is saved; the same command goes on from there")
                return signals.exit_code
        result = look(steps, current.model, None)
        texts = write(steps, current.model)

    lines = evaluation.python_lines(texts)
    print(f"complete lines of {len(texts)} samples that tokenize accepts as Python: {lines:.1%}")
    print(f"gzip -9 bits per byte of the same text: {data.gzip_bits_per_byte(dataset.held_out_text()):.4f}")
    print(f"held-out bits per byte: {result.bits_per_byte:.4f}")
    print(f"sample: {texts[0]}")
    return 0


class Speed:
    """A step's row for the logbook, with tokens per second and, where the chip's peak is known, FLOPs utilisation."""

    def __init__(self, config: Config, kind: str, devices: int):
        self.flops, self.peak = flops.per_token(config.model), flops.PEAK_FLOPS.get(kind, 0.0) * devices
        self.previous: Metrics | None = None
        self.time, self.note = time.perf_counter(), ""

    def __call__(self, metrics: Metrics) -> dict[str, Any]:
        # Waits for the step before this one, so that the device always has one to go on with.
        awaited = self.previous or metrics
        loss, tokens, self.previous = float(awaited.loss), float(awaited.tokens), metrics
        now = time.perf_counter()
        rate, self.time = tokens / (now - self.time), now
        row: dict[str, Any] = {
            name: getattr(metrics, name) for name in ("loss", "grad_norm", "learning_rate", "tokens")
        }
        row |= {"tokens_per_second": rate, "balance": metrics.balance, "router_z": metrics.router_z}
        row["batch_hash"] = data.BatchHash(metrics.batch)
        self.note = f"loss {loss:.3f} · {rate:,.0f} tokens/s"
        if self.peak:
            row["mfu"] = rate * self.flops / self.peak
            self.note += f" · MFU {row['mfu']:.1%}"
        return row


def abstract_batch(sharding: NamedSharding, *shape: int) -> Batch:
    """A batch's shapes, types and placement."""
    return Batch(*(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for _ in Batch._fields))


def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def progress(console: Console) -> Progress:
    """Steps, the bar, what the loop notes, time gone and time left."""
    note = TextColumn("{task.fields[note]}")
    return Progress(
        MofNCompleteColumn(), BarColumn(), note, TimeElapsedColumn(), TimeRemainingColumn(), console=console
    )


def dry_run(config: Config) -> None:
    """Print what the run would be; nothing is allocated."""
    abstract = state.abstract_state(config.model, compute_dtype(config.precision), optim.optimizer(config.optim))
    total, (_, active) = parameters.count(abstract.model), flops.parameters(config.model)
    per_token = flops.per_token(config.model)
    if config.json:
        print(json.dumps({"parameters": {"total": total, "active": active}, "flops_per_token": {"hand": per_token}}))
    else:
        print(f"preset {config.preset}: {total:,} parameters, {active:,} of them active for a token")
        print(f"a token takes {per_token:,.0f} FLOPs of training")


def main(argv: list[str]) -> int:
    try:
        config = command_line.parse(argv, __doc__)
        if found := problems(config, jax.device_count()):
            raise ValueError("\n".join(found))
        if config.dry_run:
            dry_run(config)
            return 0
        return train(config, Console(stderr=True))
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
