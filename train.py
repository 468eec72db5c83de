"""Train VishwamAI: text -> tokens -> rows -> steps over a mesh -> checkpoints.

    python train.py                       preset tiny on Python's own library
    python train.py --data 'texts/*.md'   your text
    python train.py --run-dir runs/tiny   go on where that run stopped

On one CPU core and on a mesh of TPU chips: one device is the mesh of one.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import vishwamai_eqx  # noqa: F401  isort: skip  (before jax, whose platform it chooses)
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vishwamai_eqx import (
    accounting,
    checkpoint,
    command_line,
    data,
    dry_run,
    environment,
    evaluation,
    flops,
    logbook,
    nonfinite,
    optim,
    plan,
    policy,
    processes,
    run,
    saved_config,
    scaling,
    skip,
    state,
    targets,
    teaching,
)
from vishwamai_eqx.accounting import Clock
from vishwamai_eqx.architecture import Model
from vishwamai_eqx.checkpoint import Checkpoints
from vishwamai_eqx.config import BATCH_AXES, Config, ProcessesConfig, parse_mesh, to_dict
from vishwamai_eqx.data import Batch
from vishwamai_eqx.feed import Feed
from vishwamai_eqx.guard import Refusals, Signals
from vishwamai_eqx.logbook import Logbook
from vishwamai_eqx.loss import cross_entropy
from vishwamai_eqx.mesh import gather, index, make_mesh, on_mesh, size, sum_over
from vishwamai_eqx.metrics import Metrics
from vishwamai_eqx.moe import RouterMetrics
from vishwamai_eqx.precision import compute_dtype
from vishwamai_eqx.skip import Skips
from vishwamai_eqx.speed import Speed
from vishwamai_eqx.state import TrainState
from vishwamai_eqx.validation import problems
from vishwamai_eqx.version import code_version
from vishwamai_eqx.watchdog import Watchdog

P = PartitionSpec
MICROBATCHES = P(None, BATCH_AXES)  # of [microbatches, rows, seq]


def make_step(
    config: Config, mesh: Mesh, specs: TrainState, transform: optax.GradientTransformation, *tutors: teaching.Tutor
) -> jax.stages.Wrapped:
    """The training step, from a `TrainState` and a `Batch`, and a teacher that lies so, to the next and `Metrics`.

    Gradients are summed over microbatches and devices, judged, clipped, and go through optax.
    """
    schedule = optim.learning_rate(config.optim)

    def loss(
        model: Model, probes: Array, meters: Any, batch: Batch, lesson: Any, tokens: Array, key: Any, first_row: Array
    ) -> tuple[Array, Any]:
        """A microbatch's part of the step's loss: sums over its rows, divided by what the whole step has."""
        # Once for both uses of a tied embedding, whose gradients are added before they cross the wire.
        embedding = gather(model.embedding, specs.model.embedding, jnp.dtype(model.compute_dtype))
        model = eqx.tree_at(lambda tree: tree.embedding, model, embedding)
        placement = eqx.tree_at(lambda tree: tree.embedding.weight, specs.model, P())
        hidden, _, router = model(
            batch.tokens,
            segment_ids=batch.segment_ids,
            positions=batch.positions,
            key=key,
            placement=placement,
            first_row=first_row,
            probes=probes,
            meters=meters,
            return_hidden=lesson is not None and bool(lesson.pairs),
        )
        nll = token_loss(model, placement, hidden, batch) / tokens
        objective, told, router = teaching.objective(lesson, nll, model, placement, hidden, router, batch)
        if not isinstance(router, RouterMetrics):  # of a dense model, or a Gemma
            return objective, (nll, jnp.zeros(()), jnp.zeros(()), None, told)
        router = sum_over(router, *BATCH_AXES)
        balance, z = (rows.mean() / config.optim.batch_size for rows in (router.balance, router.z))
        total = objective + config.optim.balance_loss_weight * balance + config.optim.router_z_loss_weight * z
        return total, (nll, balance, z, router.load, told)

    def step(current: TrainState, batch: Batch, *tutor: teaching.Tutor) -> tuple[TrainState, Metrics]:
        tokens = sum_over((batch.segment_ids > 0).sum(dtype=jnp.float32), *BATCH_AXES)
        key = jax.random.fold_in(jax.random.key(config.seed), current.step) if config.model.dropout_rate else None
        lesson = teaching.begin(config, tutor, tutors, batch, current.step)
        microbatches, rows = batch.tokens.shape[:2]

        # Nobody sums gradients over devices here. The loss is a sum over them already, and its transpose hands each
        # device the gradient of its own shards, complete: scattered for what was gathered, summed for what was copied.
        # The gradients of the probes say in which layer the forward pass was not finite.
        def accumulate(gradients: tuple[Model, Array, Any], xs: tuple[Batch, Array]) -> tuple[Any, Any]:
            part, number = xs
            first_row = (number * size(*BATCH_AXES) + index(*BATCH_AXES)) * rows
            differentiated = jax.grad(scaling.magnified(loss, current.scaling), argnums=(0, 1, 2), has_aux=True)
            more, metrics = differentiated(*variables, part, lesson, tokens, key, first_row)
            sums = jax.tree.map(jnp.add, gradients[:2], more[:2])
            return (*sums, scaling.together(gradients[2], more[2])), metrics

        meters = scaling.meters(current.scaling, current.model, config)
        variables = current.model, jnp.zeros(config.model.num_layers + 1), meters
        zeros = jax.tree.map(jnp.zeros_like, variables)
        (gradients, probes, seen), metrics = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(microbatches)))
        nll, balance, z, load, told = jax.tree.map(lambda parts: parts.sum(axis=0), metrics)

        gradients = scaling.reduced(gradients, current.scaling)
        squares = optim.squares(gradients)
        norm = optim.global_norm(squares, specs.model)
        take, watch = skip.judge(current.watch, nll, norm, config.guard)
        broken = nonfinite.broken(probes, squares)
        gradients = optim.clip(gradients, norm, config.optim.clip_norm)
        before = current.opt_state
        if config.offload:
            before = optim.fetch(transform, before, gradients)
        updates, opt_state = transform.update(gradients, before, current.model)
        new = optax.apply_updates(current.model, updates), opt_state
        model, opt_state = skip.choose(take, new, (current.model, before))
        scales = scaling.after(current.scaling, seen, take, norm, config)
        metrics = Metrics(
            loss=nll,
            balance=balance,
            router_z=z,
            grad_norm=norm,
            learning_rate=jnp.asarray(schedule(before[-1].count)),
            tokens=tokens.astype(jnp.int32),
            load=None if load is None else load / load.sum(axis=-1, keepdims=True),
            batch=sum_over(
                data.hash_lanes(jax.tree.map(lambda rows: rows.reshape(-1, rows.shape[-1]), batch)), *BATCH_AXES
            ),
            watch=watch,
            broken=broken,
            told=told,
            scaled=scaling.told(current.scaling, seen, microbatches),
        )
        if config.offload:
            opt_state = optim.hand_back(transform, opt_state)
        return TrainState(model, opt_state, watch, scales, current.step + 1), metrics  # pyright: ignore[reportArgumentType]

    in_specs = (specs, on_mesh(MICROBATCHES, mesh), *tutors)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=(specs, P()), check_vma=True)
    return jax.jit(sharded, donate_argnums=0)


def abstract_step(config: Config, mesh: Mesh, dtype: str, vocabularies: Any = None) -> tuple[Any, tuple[Any, ...]]:
    """The step of a mesh that may not be here, and the shapes, types and placement of what it takes."""
    transform = optim.optimizer(config.optim)
    shapes = state.abstract_state(config, dtype, transform)
    specs = state.placement(shapes, dict(mesh.shape), transform)
    microbatches, rows = config.optim.microbatches, config.optim.batch_size
    batch = jax.ShapeDtypeStruct(
        (microbatches, rows // microbatches, config.model.max_seq_len),
        jnp.int32,
        sharding=NamedSharding(mesh, MICROBATCHES),
    )
    placed = state.shardings(mesh, specs)
    if config.offload:
        moments = optim.on_host(transform, placed.opt_state)
        placed = eqx.tree_at(lambda it: it.opt_state, placed, moments)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, placed
    )
    tutor = teaching.abstract(config, mesh, dtype, vocabularies)
    lies, fed = jax.tree.map(lambda leaf: leaf.sharding.spec, tutor), teaching.abstract_batch(config, batch)
    return make_step(config, mesh, specs, transform, *lies), (abstract, fed, *tutor)


def token_loss(model: Model, specs: Model, hidden: Array, batch: Batch) -> Array:
    """The sum of the cross-entropy over the tokens of all devices."""
    head = gather(model.head_weight, specs.head_weight, hidden.dtype)
    real = (batch.segment_ids > 0).astype(jnp.float32)
    with jax.named_scope("cross_entropy"):
        return sum_over(cross_entropy(hidden, head.weight, batch.targets, real, model.softcap), *BATCH_AXES)


class Setup(NamedTuple):
    """What a run is made of, whether it trains or does a step again."""

    dataset: data.Dataset
    rows: Any  # what the steps are fed with: the dataset, or both tokenizations of it
    tutor: tuple[teaching.Tutor, ...]
    mesh: Mesh
    dtype: str
    specs: TrainState
    """Where each array of the state lies."""
    abstract: TrainState
    """The state's shapes and types, each with its sharding."""
    new_state: Callable[[], TrainState]
    fed: NamedSharding
    """Of a batch."""
    step: Future[jax.stages.Compiled]
    """Being compiled."""


def set_up(config: Config) -> Setup:
    """Tokenize the text, lay the state out over the mesh, compile the step; no array is made yet."""
    assert config.run_dir is not None
    processes.require_same(to_dict(dataclasses.replace(config, processes=ProcessesConfig())))
    with processes.together():
        corpus = data.load_documents(config.data, config.seed)
    processes.require_same({"data": {"fingerprint of the text": corpus.fingerprint}})
    with processes.together():
        if processes.primary():
            run.make_tokenizer(config, corpus, teaching.tokenizer(config))
    with processes.together():
        tokenizer = run.tokenizer_of(config.run_dir, config)
        origin = {"tokenizer": tokenizer.fingerprint, **teaching.fingerprints(config)}
        checkpoint.check_origin(config.run_dir / "checkpoints", origin)
        length, rows = config.model.max_seq_len, config.optim.batch_size
        read = data.fingerprint(corpus, tokenizer, seq_len=length, batch_size=rows, seed=config.seed)
        targets.check(config, {**origin, "data": read})
        vocabularies = teaching.vocabularies(config, tokenizer)
    settled = plan.settled(config, jax.device_count(), accounting.capacity())
    mesh, dtype = make_mesh(parse_mesh(settled.mesh, jax.device_count())), compute_dtype(config.precision)
    # The step needs no more than shapes: it is compiled while text is tokenized and parameters are drawn.
    step, (abstract, batch, *tutor) = abstract_step(config, mesh, dtype, vocabularies)
    if not checkpoint.steps(config.run_dir / "checkpoints"):
        state.check(config, abstract)
    compiling = ThreadPoolExecutor(1).submit(step.lower(abstract, batch, *tutor).compile)
    with processes.together():
        dataset = data.prepare(corpus, tokenizer, seq_len=length, batch_size=rows, seed=config.seed)
        checkpoint.check_origin(config.run_dir / "checkpoints", dataset.fingerprints)
    shardings, transform = jax.tree.map(lambda leaf: leaf.sharding, abstract), optim.optimizer(config.optim)
    tutor = teaching.load(config, tutor, vocabularies)
    return Setup(
        dataset,
        teaching.rows(dataset, config),
        tutor,
        mesh,
        dtype,
        jax.tree.map(lambda sharding: sharding.spec, shardings),
        abstract,
        lambda: teaching.inherit(config, tutor, state.initialise(config, dtype, transform, shardings)),
        NamedSharding(mesh, MICROBATCHES),
        compiling,
    )


def train(config: Config, console: Console, started: float, signals: Signals) -> int:
    """Run to the last step, or to a signal; the exit code. `started` is when the program did, by `perf_counter`."""
    assert config.run_dir is not None
    dataset, rows, tutor, mesh, dtype, specs, abstract, new_state, fed, compiling = set_up(config)

    evaluate = evaluation.make_evaluate(token_loss, mesh, specs.model)
    steps, microbatches = config.optim.steps, config.optim.microbatches
    kind, signals.processes = jax.devices()[0].device_kind, jax.process_count()
    total, active = flops.parameters(config)
    console.print(
        f"{config.run_dir}: {total:,} parameters, {active:,} active, in {dtype} on {mesh.size} {kind}, "
        f"mesh {', '.join(f'{axis}={n}' for axis, n in mesh.shape.items() if n > 1) or 'of one'}\n"
        f"{steps} steps of {config.optim.batch_size} rows of {config.model.max_seq_len} tokens; "
        f"an epoch is {dataset.batches_per_epoch:,.0f} steps",
        highlight=False,
    )

    def tell(kind: str, message: str, *, step: int | None = None) -> None:
        """Log an event, and show it unless all is well: a damaged file, a save that failed, a run that hangs."""
        log.event(kind, message, step=step)
        if kind != "checkpoint":
            console.print(message, highlight=False, markup=False, soft_wrap=True)

    with (
        Logbook(
            config.run_dir,
            configuration=to_dict(config),
            environment={**code_version(), "devices": f"{mesh.size} {kind}", "mesh": dict(mesh.shape)},
            process=jax.process_index(),
        ) as log,
        Checkpoints(
            config.run_dir / "checkpoints",
            every=config.checkpoint.every,
            minutes=config.checkpoint.minutes,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            configuration=to_dict(config),
            fingerprints=rows.fingerprints,
            on_event=tell,
        ) as checkpoints,
        Watchdog(config.run_dir, minutes=config.guard.hang_minutes, on_event=tell) as watchdog,
        progress(console) as bar,
        processes.bounded(),
        Refusals() as refusals,
    ):

        def look(step: int, model: Model, limit: int | None) -> evaluation.HeldOut:
            result = evaluation.held_out(evaluate, model, dataset, mesh, config.optim.batch_size // microbatches, limit)
            log.eval(step=step, **result._asdict())
            bar.console.print(
                f"step {step}: held-out loss {result.loss:.3f}, bits per byte {result.bits_per_byte:.3f}",
                highlight=False,
            )
            return result

        def write(step: int, model: Model) -> list[str]:
            # As many during the run as at its end, so that one program writes both.
            tokens = min(config.eval.sample_tokens, config.model.max_seq_len - 1)
            texts = evaluation.write(model, dataset.tokenizer, tokens=tokens, seed=step, samples=config.eval.samples)
            for text in texts:
                log.sample(step, text)
            return texts

        def go_back(current: TrainState, n: int) -> TrainState:
            """The last checkpoint's state, at step n: past the batches that were skipped, and those before them."""
            jax.tree.map(lambda leaf: leaf.delete(), (current.model, current.opt_state))  # make room for it
            restored = checkpoints.restore(abstract) or new_state()
            log.resume(first := int(restored.step))
            log.event("went_back", f"to the state of step {first}, and on with the batch after step {n}", step=n)
            restored = skip.go_on(restored, current)
            # A run that ends here goes on from here: past those batches.
            checkpoints.save(n, restored)
            return restored

        clock = Clock(started)
        current = checkpoints.restore(abstract) or new_state()
        first = int(current.step)
        if processes.primary():
            for sentence in saved_config.write(config):
                tell("configuration_damaged", sentence, step=first)
        refusals.end()
        watchdog.step(first)
        signals.waits = True
        log.resume(first)
        log.span("start", clock.lap())
        step = compiling.result()
        log.span("compile", clock.lap())
        log.event("start", f"from step {first} on {mesh.size} {kind}, {dict(mesh.shape)}", step=first)

        feed = Feed(rows, range(first, steps), fed, microbatches=microbatches)
        task = bar.add_task("", total=steps, completed=first, note="")
        speed, skips = Speed(config, kind, mesh.size), Skips(config.guard.patience, log.event)
        for n, batch in enumerate(feed, first + 1):
            current, metrics = step(current, policy.own(config.distill, rows, n - 1, current.model, batch), *tutor)
            row = speed(metrics)
            log.step(step=n, data_seconds=feed.waited, step_seconds=clock.lap() - feed.waited, **row)
            watchdog.step(n)
            bar.update(task, completed=n, note=speed.note)
            if n % 10 == 0:
                for name, size in accounting.memory().items():
                    log.memory(n, name, size)
                if metrics.load is not None:
                    log.experts(n, metrics.load)
            if back := skips.too_many(n, metrics):
                if skips.went_back:
                    log.event("stopped", skips.report(), step=n)
                    console.print(skips.report(), highlight=False, markup=False)
                    return 1
                current, skips.went_back = go_back(current, n), True
                log.span("start", clock.lap())
            if n % config.eval.every == 0 and n < steps:
                look(n, current.model, config.eval.rows)
            if n % config.eval.sample_every == 0 and n < steps:
                bar.console.print(
                    evaluation.printable(write(n, current.model)[0]), style="dim", markup=False, highlight=False
                )
            if n % config.eval.every == 0 or n % config.eval.sample_every == 0:
                log.span("eval", clock.lap(), step=n)
            stop = signals.stop(n)
            # A state in the midst of skipped steps is none to go back to.
            good = checkpoints.due(n) and not back and not int(metrics.watch.skipped)
            if good or stop or n == steps:
                checkpoints.save(n, current)
                skips.went_back &= not good
                log.span("save", clock.lap(), step=n)
            if stop:
                assert signals.received is not None
                checkpoints.wait()
                log.event("signal", f"{signals.received.name}: saved and stopped", step=n)
                console.print(f"{signals.received.name}: step {n} is saved; the same command goes on from there")
                return signals.exit_code
        skips.too_many(steps, None)
        checkpoints.wait()
        log.span("save", clock.lap(), step=steps)
        # Nothing is left to save: from here on a signal ends the program at once, as does one since the last step.
        signals.waits = False
        if signals.received:
            return signals.exit_code
        result = look(steps, current.model, None)
        texts = write(steps, current.model)
        log.span("eval", clock.lap(), step=steps)
        log.flush()
        if processes.primary():
            console.print(accounting.goodput(config.run_dir), highlight=False)

    lines = evaluation.python_lines(texts)
    print(f"complete lines of {len(texts)} samples that tokenize accepts as Python: {lines:.1%}")
    print(f"gzip -9 bits per byte of the same text: {data.gzip_bits_per_byte(dataset.held_out_text()):.4f}")
    print(f"held-out bits per byte: {result.bits_per_byte:.4f}")
    print(f"sample: {evaluation.printable(texts[0])}")
    return 0


def replay(config: Config, target: int) -> int:
    """Do a step of the run again and hold it beside the logbook: 0 if they agree to the last bit, else 1.

    Nothing in the run directory is changed, so it may be done while the run goes on.
    """
    assert config.run_dir is not None
    with logbook.connect(config.run_dir) as book:
        query = "SELECT step, loss, grad_norm, batch_hash FROM steps ORDER BY abs(step - ?) LIMIT 1"
        logged = book.execute(query, [target]).fetchone()
    if logged is None or logged[0] != target:
        nearest = f"take {logged[0]}" if logged else "it has none yet"
        raise ValueError(f"replay={target} must be a step that the logbook of {config.run_dir} has; {nearest}.")

    _, rows, tutor, mesh, _, _, abstract, new_state, fed, compiling = set_up(config)
    folder, step = config.run_dir / "checkpoints", compiling.result()
    if any(saved < target for saved in checkpoint.steps(folder)):
        current = checkpoint.read(folder, abstract, before=target, fingerprints=rows.fingerprints)
    else:
        current = new_state()
    first = int(current.step)
    for n in range(first, target - 1):
        current, _ = step(current, policy.batch(config, rows, n, fed, current.model), *tutor)
    _, metrics = step(current, policy.batch(config, rows, target - 1, fed, current.model), *tutor)
    now = (float(metrics.loss), float(metrics.grad_norm), str(data.BatchHash(metrics.batch)))
    print(f"step {target} done again from step {first} on {mesh.size} {jax.devices()[0].device_kind}")
    for name, here, then in zip(("loss", "gradient norm", "batch"), now, logged[1:], strict=True):
        # Numbers that print alike are alike to the last bit, and one NaN is as good as another.
        print(f"{name}: {here!r} agrees bit for bit" if repr(here) == repr(then) else f"{name}: {here!r} was {then!r}")
    if int(metrics.watch.skipped):
        print(f"the step is skipped: {skip.reason(metrics)}")
    return 0 if repr(now) == repr(logged[1:]) else 1


def progress(console: Console) -> Progress:
    """Steps, the bar, what the loop notes, time gone and time left."""
    note = TextColumn("{task.fields[note]}")
    return Progress(
        MofNCompleteColumn(), BarColumn(), note, TimeElapsedColumn(), TimeRemainingColumn(), console=console
    )


def impossible(config: Config) -> list[str]:
    """What cannot be of the configuration on the devices of all its processes, or on those of its topology.

    How many devices there are, no process knows before it has found the others.
    """
    if config.dry_run:
        return problems(config, dry_run.devices(config), "tpu" if config.topology else jax.default_backend())
    if mistakes := processes.problems(config.processes):
        return mistakes
    processes.join(config.processes)
    return problems(config, jax.device_count(), jax.default_backend(), jax.process_count())


def main(argv: list[str], started: float | None = None) -> int:
    """The exit code of the program with those arguments; `started` is when it began, now if it is not known."""
    started = time.perf_counter() if started is None else started
    try:
        config = command_line.parse(argv, __doc__, impossible)
        if config.dry_run:
            return dry_run.run(config, abstract_step)
        if config.replay is not None:
            with processes.bounded():
                return replay(config, config.replay)
        # Until there is a step to save, a signal ends the program at once.
        with Signals(waits=False) as signals, processes.bounded():
            return train(config, Console(stderr=True, quiet=not processes.primary()), started, signals)
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], environment.STARTED))
