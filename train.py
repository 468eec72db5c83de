"""Train VishwamAI: text -> tokens -> packed rows -> one jitted step over a mesh -> metrics, samples, checkpoints.

    python train.py                                       preset tiny on the Python standard library, in minutes
    python train.py --preset base --data 'corpus/*.txt'   your text
    python train.py --run-dir runs/tiny                   go on where that run stopped

The same script runs on one CPU core and on a mesh of TPU chips: one device is the mesh of one.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vishwamai_eqx  # isort: skip  (first: it chooses jax's platform)
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vishwamai_eqx import command_line, data, decode, flops, optim, state
from vishwamai_eqx.checkpoint import Checkpoints
from vishwamai_eqx.config import Config, parse_mesh, problems, to_dict
from vishwamai_eqx.data import Batch
from vishwamai_eqx.guard import Signals
from vishwamai_eqx.logbook import Logbook
from vishwamai_eqx.loss import cross_entropy
from vishwamai_eqx.mesh import gather, make_mesh
from vishwamai_eqx.model import VishwamAI
from vishwamai_eqx.precision import compute_dtype
from vishwamai_eqx.state import TrainState
from vishwamai_eqx.tokenizer import VishwamAITokenizer

P = PartitionSpec
BATCH = P(None, "data")  # of [microbatches, rows, seq]


class Metrics(eqx.Module):
    """What a step says of itself, the same on every device."""

    loss: Float[Array, ""]
    """Cross-entropy in nats a token."""
    balance: Float[Array, ""]
    router_z: Float[Array, ""]
    grad_norm: Float[Array, ""]
    load: Float[Array, "layers experts"] | None
    """Each expert's share of its layer's choices."""


def make_step(
    config: Config, mesh: Mesh, specs: TrainState, transform: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The training step: gradients summed over microbatches and devices, clipped, through optax."""
    key = jax.random.key(config.seed) if config.model.dropout_rate > 0 else None

    def loss(model: VishwamAI, batch: Batch, tokens: Array, key: Array | None, first_row: Array) -> tuple[Array, Any]:
        """This microbatch's part of the step's loss: sums over its rows, divided by what the whole step has."""
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
        rows = config.optim.batch_size
        router = jax.lax.psum(router, "data")
        balance, z = router.balance.mean() / rows, router.z.mean() / rows
        total = nll + config.optim.balance_loss_weight * balance + config.optim.router_z_loss_weight * z
        return total, (nll, balance, z, router.load)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens = jax.lax.psum((batch.segment_ids > 0).sum(dtype=jnp.float32), "data")
        step_key = None if key is None else jax.random.fold_in(key, state.step)
        microbatches, rows = batch.tokens.shape[:2]

        # No psum of gradients here: the loss is already a sum over devices, and its transpose hands each device the
        # gradient of its own shards, summed (reduce-scatter for what was gathered, psum for what was copied).
        def accumulate(gradients: VishwamAI, xs: tuple[Batch, Array]) -> tuple[VishwamAI, Any]:
            micro, index = xs
            first_row = (index * jax.lax.axis_size("data") + jax.lax.axis_index("data")) * rows
            more, metrics = jax.grad(loss, has_aux=True)(state.model, micro, tokens, step_key, first_row)
            return jax.tree.map(jnp.add, gradients, more), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.model)
        gradients, metrics = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(microbatches)))
        nll, balance, z, load = jax.tree.map(lambda parts: parts.sum(axis=0), metrics)

        norm = optim.global_norm(gradients, specs.model)
        gradients = optim.clip(gradients, norm, config.optim.clip_norm)
        updates, opt_state = transform.update(gradients, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        load = None if load is None else load / load.sum(axis=-1, keepdims=True)
        return TrainState(model, opt_state, state.step + 1), Metrics(nll, balance, z, norm, load)  # pyright: ignore

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(specs, BATCH), out_specs=(specs, P()), check_vma=True)
    return jax.jit(sharded, donate_argnums=0)


def token_loss(model: VishwamAI, specs: VishwamAI, hidden: Array, batch: Batch) -> Array:
    """The sum of the cross-entropy over the tokens of all devices."""
    head = gather(model.head_weight, specs.head_weight, hidden.dtype)
    real = (batch.segment_ids > 0).astype(jnp.float32)
    with jax.named_scope("cross_entropy"):
        return jax.lax.psum(cross_entropy(hidden, head.weight, batch.targets, real), "data")


def make_evaluate(mesh: Mesh, specs: VishwamAI) -> Callable[[VishwamAI, Batch], tuple[Array, Array]]:
    """The sum of the cross-entropy in nats over a batch, and its tokens."""

    def evaluate(model: VishwamAI, batch: Batch) -> tuple[Array, Array]:
        batch = jax.tree.map(lambda field: field[0], batch)
        hidden, _, _ = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, placement=specs)
        tokens = jax.lax.psum((batch.segment_ids > 0).sum(), "data")
        return token_loss(model, specs, hidden, batch), tokens

    return jax.jit(jax.shard_map(evaluate, mesh=mesh, in_specs=(specs, BATCH), out_specs=(P(), P()), check_vma=True))


def put(batch: Batch, mesh: Mesh, microbatches: int) -> Batch:
    """A batch on its devices, as [microbatches, rows, seq]."""
    sharding = NamedSharding(mesh, BATCH)

    def field(rows: Int[np.ndarray, "batch seq"]) -> Array:
        return jax.device_put(rows.reshape(microbatches, -1, rows.shape[1]), sharding)

    return Batch(*map(field, batch))


def held_out(
    evaluate: Callable[[VishwamAI, Batch], tuple[Array, Array]],
    model: VishwamAI,
    dataset: data.Dataset,
    mesh: Mesh,
    rows: int,
    limit: int | None = None,
) -> dict[str, float]:
    """Loss in nats a token and bits per byte of source text over the held-out rows, or the first `limit` of them."""
    nats, tokens, read = 0.0, 0, 0
    for batch in dataset.held_out_batches(rows, limit):
        batch_nats, batch_tokens = evaluate(model, put(batch, mesh, 1))
        read += dataset.source_bytes(batch)
        nats += float(batch_nats)
        tokens += int(batch_tokens)
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / read}


def sample(
    model: VishwamAI, tokenizer: VishwamAITokenizer, config: Config, tokens: int, seed: int, rows: int = 1
) -> list[str]:
    """Texts that the model writes by itself."""
    prompts = [[tokenizer.bos_id]] * rows
    written = decode.generate(
        model,
        prompts,
        max_new_tokens=min(tokens, config.model.max_seq_len - 1),
        eos_id=tokenizer.eos_id,
        sampling=decode.Sampling(temperature=0.8, top_p=0.95),
        seed=seed,
    )
    return [tokenizer.decode(ids) for ids in written]


def prepare_text(config: Config, run_dir: Path) -> data.Dataset:
    """The run's tokenizer, trained at the first start, and its packed rows."""
    corpus = data.load_documents(config.data, config.seed)
    folder = run_dir / "tokenizer"
    if (folder / "tokenizer.model").exists():
        tokenizer = VishwamAITokenizer(folder)
    elif config.tokenizer is not None:
        tokenizer = VishwamAITokenizer(config.tokenizer)
        tokenizer.save(folder)
    else:
        tokenizer = data.train_tokenizer(corpus, config.model.vocab_size, folder)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be the tokenizer's {tokenizer.vocab_size} pieces "
            f"({config.tokenizer or folder}); take --model.vocab-size {tokenizer.vocab_size}."
        )
    return data.prepare(
        corpus,
        tokenizer,
        seq_len=config.model.max_seq_len,
        batch_size=config.optim.batch_size,
        seed=config.seed,
        cache_dir=run_dir / "cache",
    )


def dry_run(config: Config) -> None:
    """Print what the run would be; nothing is allocated."""
    abstract = state.abstract_state(config.model, compute_dtype(config.precision), optim.optimizer(config.optim))
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.model))
    _, active = flops.parameters(config.model)
    per_token = flops.per_token(config.model)
    if config.json:
        print(json.dumps({"parameters": {"total": total, "active": active}, "flops_per_token": {"hand": per_token}}))
        return
    print(f"preset {config.preset}: {total:,} parameters, {active:,} of them active for a token")
    print(f"training takes {per_token:,.0f} FLOPs a token")


def train(config: Config, console: Console) -> int:
    """Run to the last step or to a signal; the exit code."""
    run_dir = config.run_dir
    assert run_dir is not None
    sizes = parse_mesh(config.mesh, jax.device_count())
    mesh = make_mesh(sizes)
    transform, dtype = optim.optimizer(config.optim), compute_dtype(config.precision)
    dataset = prepare_text(config, run_dir)
    command_line.write_config(config)
    total, active = flops.parameters(config.model)
    console.print(
        f"{run_dir}: {total:,} parameters ({active:,} active) in {dtype} on {mesh.size} {jax.devices()[0].device_kind}; "
        f"{config.optim.steps} steps of {config.optim.batch_size} rows of {config.model.max_seq_len} tokens, "
        f"{dataset.batches_per_epoch:,.0f} steps an epoch",
        highlight=False,
    )

    abstract = state.abstract_state(config.model, dtype, transform)
    specs = state.placement(abstract, sizes, transform)
    shardings = state.shardings(mesh, specs)
    step = make_step(config, mesh, specs, transform)
    evaluate = make_evaluate(mesh, specs.model)
    schedule = optim.learning_rate(config.optim)
    peak = flops.PEAK_FLOPS.get(jax.devices()[0].device_kind)
    eval_rows = math.ceil(max(config.optim.batch_size // config.optim.microbatches, 16) / mesh.size) * mesh.size

    with (
        Signals() as signals,
        Logbook(run_dir, configuration=to_dict(config)) as log,
        Checkpoints(
            run_dir / "checkpoints",
            every=config.checkpoint.every,
            keep=config.checkpoint.keep,
            configuration=to_dict(config),
            on_event=log.event,
        ) as checkpoints,
    ):
        current = checkpoints.restore(
            jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                abstract,
                shardings,
            )
        )
        if current is None:
            current = state.initialise(config.model, dtype, transform, config.seed, shardings)
        first = int(current.step)
        log.resume(first)
        log.event("start", f"step {first} on {sizes}", step=first)

        with progress(console) as bar:
            task = bar.add_task("train", total=config.optim.steps, completed=first, note="compiling")
            host = dataset.batch(first)
            batch, before = put(host, mesh, config.optim.microbatches), time.perf_counter()
            previous: Metrics | None = None
            for n in range(first, config.optim.steps):
                batch_hash, tokens = data.batch_hash(host), int((host.segment_ids > 0).sum())
                current, metrics = step(current, batch)
                # The device works on; the next batch is made and sent meanwhile.
                began = time.perf_counter()
                if n + 1 < config.optim.steps:
                    host = dataset.batch(n + 1)
                    batch = put(host, mesh, config.optim.microbatches)
                data_wait = time.perf_counter() - began
                # One step late, so that the device never waits for the host to print.
                loss = float((previous or metrics).loss)
                previous, now = metrics, time.perf_counter()
                rate, before = tokens / (now - before), now
                mfu = {} if peak is None else {"mfu": rate * flops.per_token(config.model) / (peak * mesh.size)}
                log.step(
                    step=n + 1,
                    loss=metrics.loss,
                    grad_norm=metrics.grad_norm,
                    learning_rate=float(schedule(n)),
                    tokens=tokens,
                    tokens_per_second=rate,
                    batch_hash=batch_hash,
                    balance=metrics.balance,
                    router_z=metrics.router_z,
                    data_seconds=data_wait,
                    **mfu,
                )
                note = f"loss {loss:.3f} · {rate:,.0f} tokens/s" + "".join(f" · MFU {v:.1%}" for v in mfu.values())
                bar.update(task, completed=n + 1, note=note)

                last = n + 1 == config.optim.steps
                if metrics.load is not None and (n + 1) % 10 == 0:
                    log.experts(n + 1, metrics.load)
                if (n + 1) % config.eval.every == 0 and not last:
                    result = held_out(evaluate, current.model, dataset, mesh, eval_rows, config.eval.rows)
                    log.eval(step=n + 1, **result)
                    bar.console.print(
                        f"step {n + 1}: held-out loss {result['loss']:.3f}, bits per byte {result['bits_per_byte']:.3f}"
                    )
                if (n + 1) % config.eval.sample_every == 0 and not last:
                    (text,) = sample(current.model, dataset.tokenizer, config, config.eval.sample_tokens, n)
                    log.sample(n + 1, text)
                    bar.console.print(text, style="dim", markup=False, highlight=False)
                if checkpoints.due(n + 1) or last or signals.received:
                    checkpoints.save(n + 1, current)
                if signals.received:
                    checkpoints.wait()
                    log.event("signal", f"{signals.received.name}: saved, exiting", step=n + 1)
                    console.print(f"{signals.received.name}: step {n + 1} is saved in {run_dir}")
                    return signals.exit_code
        finish(config, dataset, current.model, functools.partial(held_out, evaluate), mesh, eval_rows, log)
    return 0


def finish(
    config: Config,
    dataset: data.Dataset,
    model: VishwamAI,
    measure: Callable[..., dict[str, float]],
    mesh: Mesh,
    rows: int,
    log: Logbook,
) -> None:
    """Measure on all held-out text, and write."""
    result = measure(model, dataset, mesh, rows)
    log.eval(step=config.optim.steps, **result)
    texts = sample(model, dataset.tokenizer, config, 128, config.seed, rows=32)
    for text in texts:
        log.sample(config.optim.steps, text)
    print(f"gzip -9 bits per byte: {data.gzip_bits_per_byte(dataset.held_out_text()):.4f}")
    print(f"held-out bits per byte: {result['bits_per_byte']:.4f}")
    print(f"sample: {texts[0]}")


def progress(console: Console) -> Progress:
    """The bar: steps, what the loop notes, time."""
    return Progress(
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


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
