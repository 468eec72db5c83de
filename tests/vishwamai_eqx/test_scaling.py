"""One scale a tensor in fp8: from the numbers at hand or from those of earlier steps, on every mesh, in every start."""

import dataclasses
import functools
import itertools
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from kernels import Meter, Meters, fp8_gemm, fp8_weights
from kernels.gemm.meters import metered
from tests import test_train
from tests.histories import SETTINGS, numbers, stored, text
from tests.kernels import formats64 as exact
from tests.kernels.comparison import normal
from tests.small import MIXED, random_batch, rarely, small, worst
from tests.test_train import run
from vishwamai_eqx import optim, scaling, skip, state
from vishwamai_eqx.architecture import build
from vishwamai_eqx.config import PRESETS, SHARED_INPUTS, ScalingConfig
from vishwamai_eqx.gemma import Decoder
from vishwamai_eqx.gemma_config import GemmaConfig
from vishwamai_eqx.logbook import connect
from vishwamai_eqx.mesh import P, make_mesh
from vishwamai_eqx.state import TrainState
from vishwamai_eqx.validation import problems


def config(how, **settings):
    scales = ScalingConfig(how, **{name: settings.pop(name) for name in ("history", "skip") if name in settings})
    shape = {"hidden_size": 128, "ffn_dim": 64, "num_layers": 1, **settings}
    return dataclasses.replace(small(**shape), precision="fp8", scaling=scales)


@functools.cache
def trained(how, steps=2):
    return run(config(how, history=3), {}, steps, "bfloat16")


def meter(scale=None):
    return Meter(None if scale is None else jnp.float32(scale), jnp.zeros(()), jnp.zeros(()))


def test_one_scale_for_all_devices_and_what_they_saw():
    """Each with other numbers; a scale that is given saturates what is beyond it, and nobody else's numbers change."""
    x = normal(0, (8, 16)) * np.exp2(np.arange(8))[:, None]

    def one(x, given):
        here, seen_here = metered(x, jnp.float8_e4m3fn, meter())
        late, seen_late = metered(x, jnp.float8_e4m3fn, meter(0.0)._replace(scale=given))
        return here, late, seen_here, seen_late

    spread = jax.shard_map(
        one, mesh=make_mesh({"data": 8}), in_specs=(P("data"), P()), out_specs=(*[P("data")] * 2, P(), P())
    )
    for given in (0.0, 0.125):
        here, late, seen_here, seen_late = jax.jit(spread)(x, jnp.float32(given))
        scale = np.exp2(np.ceil(np.log2(float(jnp.abs(x).max()) / 448)))
        assert (here.scales == scale).all() and (late.scales == (given or scale)).all()
        assert seen_here.scale is None and seen_late.scale == jnp.abs(x).max()
        beyond = np.abs(x) >= 464 * (given or scale)
        assert seen_here.saturated == 0 and seen_late.saturated == beyond.mean() and bool(given) == beyond.any()
        gone = (np.asarray(here.values, np.float32) == 0) & (np.asarray(x) != 0)
        assert seen_here.underflown == gone.mean()
        back = np.asarray(here.values, np.float64) * scale
        exact.assert_within(back, np.asarray(x, np.float64), exact.error(x, "e4m3", None), "of all devices")


@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_with_meters(transposed):
    """Within the formats' bounds of f64, forward and backward; what was seen flows back as the meters' gradients."""
    x, w, g = normal(0, (24, 40)).at[3, 5].set(1e4), normal(1, (40, 16)), normal(2, (24, 16)) * 1e-3
    scales = [2.0**6, 2.0**-6, 2.0**-24]
    meters = Meters(meter(scales[1]), meter(scales[0]), meter(scales[2]))

    @jax.jit
    def run(x, w, meters, g):
        product = lambda x, w, meters: fp8_gemm(x, fp8_weights(w, 128, meters), transposed=transposed)  # noqa: E731
        y, pull = jax.vjp(product, x, w.T if transposed else w, meters)
        return y, *pull(g)

    y, dx, dw, seen = run(x, w, meters, g)
    dw = dw.T if transposed else dw
    assert [of.scale for of in (seen.inputs, seen.weights, seen.gradients)] == [jnp.abs(it).max() for it in (x, w, g)]
    assert all(of.saturated == 0 for of in seen)

    def error(x, name, scale):
        x = np.abs(np.asarray(x, np.float64))
        return np.maximum(exact.RELATIVE[name] * x, scale * exact.STEP[name] / 2) * (1 + exact.ROUNDING)

    x, w, g = (np.asarray(it, np.float64) for it in (x, w, g))
    of_x, of_w, of_g = error(x, "e4m3", scales[0]), error(w, "e4m3", scales[1]), error(g, "e5m2", scales[2])
    exact.assert_within(y, x @ w, exact.product_error(x, of_x, w, of_w), "y")
    exact.assert_within(dx, g @ w.T, exact.product_error(g, of_g, w.T, of_w.T), "dx")
    exact.assert_within(dw, x.T @ g, exact.product_error(x.T, of_x.T, g, of_g), "dw")


def test_delayed_scales_are_those_of_the_last_steps():
    metrics, after = trained("delayed")
    before = build(config("delayed"), "bfloat16", jax.random.key(0))
    kept = after.scaling.largest.blocks
    assert kept.experts.gate.weights.shape == (1, 3) and after.scaling.largest.embedding.weight is None
    # The first update's learning rate is 0: both steps saw the weights that the run began with.
    for now, then in (
        (kept.attention.query.weight, before.blocks.attention.query.weight),
        (kept.experts.down, before.blocks.experts.down),
    ):
        largest = float(jnp.abs(then.astype(jnp.bfloat16)).max())
        np.testing.assert_array_equal(now.weights[0], [largest, largest, 0])
        assert (now.gradients[0, :2] > 0).all() and (now.inputs[0, :2] > 0).all()
    # At first nothing is known, and the numbers at hand decide, as they always do for `tensor`.
    at_hand, last = trained("tensor")
    assert metrics[0].loss == at_hand[0].loss and metrics[0].grad_norm == at_hand[0].grad_norm
    assert last.scaling.largest is None
    # Then they are the last step's, which of these numbers are no others but for the octave of a few.
    assert metrics[1].loss == pytest.approx(at_hand[1].loss, rel=1e-3)
    wide, _ = run(dataclasses.replace(config("delayed"), precision="bf16"), {}, 1, "bfloat16")
    assert 1e-4 < abs(metrics[0].grad_norm / wide[0].grad_norm - 1) < 0.1


def test_nothing_else_touches_it():
    """Neither moments nor decay are kept of it, and the norm that clips is that of the model's gradients alone."""
    transform = optim.optimizer(config("delayed").optim)
    abstract = {how: state.abstract_state(config(how), "bfloat16", transform) for how in ("block", "delayed")}
    shapes = {how: jax.tree.map(lambda leaf: leaf.shape, (of.model, of.opt_state)) for how, of in abstract.items()}
    assert jax.tree.leaves(shapes["block"]) == jax.tree.leaves(shapes["delayed"])
    assert jax.tree.leaves(abstract["block"].scaling) == []
    assert len(jax.tree.leaves(abstract["delayed"].scaling)) == 3 * 7
    (metrics, _), (_, after) = trained("delayed"), trained("delayed", 1)
    beta = 1 - config("delayed").optim.beta1
    norm = np.sqrt(sum(float(jnp.square(m / beta).sum()) for m in jax.tree.leaves(after.opt_state[0].mu)))
    assert norm == pytest.approx(min(float(metrics[0].grad_norm), 1.0), rel=1e-4)


@pytest.mark.parametrize(("sizes", "microbatches"), [({}, 2), rarely(MIXED, 1)], ids=str)
def test_microbatches_and_meshes_see_the_same(sizes, microbatches):
    """The largest of all microbatches and devices: of weights to the last bit, of what is computed within rounding."""
    (expected,), one = trained("delayed", 1)
    delayed = config("delayed", history=3, optim={"microbatches": microbatches})
    (found,), other = run(delayed, sizes, 1, "bfloat16")

    def largest(state, of_weights):
        leaves = jax.tree_util.tree_leaves_with_path(state.scaling)
        return [leaf for path, leaf in leaves if (path[-1].name == "weights") == of_weights]

    assert worst(largest(one, True), largest(other, True)) == 0
    assert worst(largest(one, False), largest(other, False)) < 0.1
    np.testing.assert_allclose(found.loss, expected.loss, rtol=2e-3)
    assert found.scaled.saturated.weights == 0


def test_a_gemmas_layers_are_seen_too():
    """Those of its period and those after it: what went into each is what flows back."""
    kinds = ("sliding_attention", "full_attention", "sliding_attention")
    shape = GemmaConfig("gemma2", 32, 16, 24, 3, 2, 1, 8, layer_types=kinds, sliding_window=4)
    delayed = config("delayed")
    model = Decoder(shape, "bfloat16", fp8=delayed.scaling, key=jax.random.key(0))
    scales = scaling.begin(model, delayed)

    @jax.jit
    def seen(model, meters):
        tokens = jnp.arange(1, 9)[None]
        loss = lambda meters: jnp.sum(model(tokens, meters=meters)[0].astype(jnp.float32) ** 2)  # noqa: E731
        return jax.grad(loss)(meters)

    found = scaling.after(
        scales, seen(model, scaling.meters(scales, model, delayed)), jnp.asarray(True), jnp.ones(()), delayed
    )
    for stack, of in zip(model.stacks, [*found.largest.period, *found.largest.rest], strict=True):
        largest = jnp.abs(stack.mlp.down.weight.astype(jnp.bfloat16)).max(axis=(1, 2))
        np.testing.assert_array_equal(of.mlp.down.weight.weights[:, 0], largest)
        assert (of.attention.query.weight.inputs[:, 0] > 0).all() and (of.mlp.up.weight.gradients[:, 0] > 0).all()


def test_a_step_that_is_not_taken_leaves_the_scales():
    def broken(current):
        return eqx.tree_at(lambda s: s.model.blocks.attention.query.weight, current, replace_fn=lambda w: w * jnp.nan)

    (metrics,), after = run(config("delayed", history=3), {}, 1, "bfloat16", broken)
    assert metrics.watch.skipped == 1
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(after.scaling))


def test_layers_that_are_skipped_stay_in_bf16():
    """By the names of their weights; of what is skipped nothing is remembered."""
    abstract = jax.eval_shape(
        lambda: scaling.begin(
            build(config("delayed"), "bfloat16", jax.random.key(0)), config("delayed", skip=("out", "gate", "up"))
        )
    )
    assert abstract.largest.blocks.attention.out.weight is abstract.largest.blocks.experts.gate is None
    assert abstract.largest.blocks.attention.query.weight is not None

    def rounded(*skip):
        """How many arrays are rounded to fp8: the weights, and each input once."""
        model, tokens = build(config("block", skip=skip), "bfloat16", jax.random.key(0)), jnp.zeros((2, 16), jnp.int32)
        return str(jax.make_jaxpr(lambda model: model(tokens)[0])(model)).count("name=_rounded")

    assert [rounded(), rounded("out", "down"), rounded(*itertools.chain(*SHARED_INPUTS))] == [7 + 4, 5 + 2, 0]


def refused(precision="fp8", platform=None, **settings):
    scales = dataclasses.replace(PRESETS["tiny"], precision=precision, scaling=ScalingConfig(**settings))
    return problems(scales, 1, platform)


def test_what_is_refused():
    names = "query, key, value, out, gate, up, down"
    assert refused(skip=("queries",)) == [f"scaling.skip=('queries',) must be of {names}; take a name of these."]
    (sentence,) = refused(skip=("query", "gate", "up"))
    assert sentence.endswith("must be all of those with one input, or none; take query key value.")
    assert refused(history=0)[0].startswith("scaling.history=0 must be at least 1")
    (sentence,) = refused(loss_start=3)
    assert sentence == "scaling.loss_start=3 must be a power of two from 1 to 2**24; take 32768."
    (one, other) = refused("bf16", fp8="delayed", skip=("out",))
    assert one == "scaling.fp8='delayed' must be left alone but in fp8; take --precision fp8 too."
    assert other.startswith("scaling.skip=('out',) must be left alone but in fp8")
    assert refused("f16", "cpu") == refused("bf16", "tpu") == []
    assert refused("f16", "tpu") == ["precision='f16' must be a type of TPUs; take bf16."]


def test_it_is_saved_and_restored(tmp_path, capsys):
    """A run that goes on has the numbers it would have had; with other scales it is refused in words."""
    run_dir, corpus = tmp_path / "run", text(tmp_path)
    own = ["--steps=4", "--checkpoint.every=2", "--optim.batch-size=4", "--mesh=data=1", "--eval.samples=1"]
    command = ["--run-dir", str(run_dir), "--data", corpus, *own, *SETTINGS, "--precision=fp8"]
    assert train.main([*command, "--fp8-scaling=delayed"]) == 0
    (rows, _), whole = numbers(run_dir), stored(run_dir, 4)
    assert len([name for name in whole if name.startswith("scaling/largest/blocks/")]) == 21
    with connect(run_dir) as book:
        told = book.execute(
            "SELECT more['fp8_saturated_gradients'], more['fp8_underflown_inputs'] FROM steps"
        ).fetchall()
    assert all(0 <= share < 1 for row in told for share in row) and any(share > 0 for _, share in told)
    shutil.rmtree(run_dir / "checkpoints" / "4")
    assert train.main([*command, "--fp8-scaling=delayed"]) == 0
    assert numbers(run_dir)[0] == rows
    again = stored(run_dir, 4)
    assert all(again[name].tobytes() == whole[name].tobytes() for name in whole)
    assert train.main([*command, "--fp8-scaling=tensor"]) == 2
    assert "scaling.fp8" in capsys.readouterr().err


def in_f16(**settings):
    return dataclasses.replace(small(num_layers=1), precision="f16", scaling=ScalingConfig(**settings))


def test_the_factor_is_halved_and_doubled():
    """Halved where a gradient is not finite, down to 1; doubled after so many steps; a spike changes nothing."""
    config, now, factors = in_f16(loss_start=4, loss_steps=2), scaling.begin(None, in_f16(loss_start=4)), []
    inf, fine = np.inf, 1.0
    step = jax.jit(lambda now, take, norm: scaling.after(now, None, take, norm, config))
    for take, norm in [(1, fine), (1, fine), (1, fine), (0, inf), (1, fine), (0, fine), (1, fine)] + [(0, np.nan)] * 4:
        now = step(now, jnp.asarray(bool(take)), jnp.float32(norm))
        factors.append(float(now.loss.factor))
    assert factors == [4, 8, 8, 4, 4, 4, 8, 4, 2, 1, 1]


def test_a_planted_overflow_is_skipped_on_all_devices_alike(monkeypatch):
    """In step 3 one row's gradient is beyond f16: no device takes the step, the factor falls, the next is taken; on one
    device and on eight the decisions are the same, bit for bit."""
    right = train.token_loss

    def token_loss(model, specs, hidden, batch):
        factor = jnp.where((batch.positions == 1000).any(), 6e4, 1).astype(hidden.dtype)
        return right(model, specs, hidden * factor, batch)

    monkeypatch.setattr(train, "token_loss", token_loss)
    monkeypatch.setattr(test_train, "random_batch", planted)
    settings, decided = in_f16(loss_start=2**10, loss_steps=2), []
    for sizes in ({}, {"data": 8}):
        metrics, after = run(settings, sizes, 5, "float16")
        decided.append([(float(it.scaled.factor), int(it.watch.skipped)) for it in metrics])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.model, after.opt_state)))
        assert [bool(np.isfinite(it.grad_norm)) for it in metrics] == [True, True, False, True, True]
        assert after.watch.taken == 4
    assert decided[0] == decided[1] == [(2**10, 0), (2**10, 0), (2**11, 1), (2**10, 0), (2**10, 0)]
    assert after.scaling.loss.factor == 2**11


def planted(rows, seq, seed):
    batch = random_batch(rows, seq, seed)
    if seed == 2:
        batch.positions[rows // 2, -1] = 1000
    return batch


def test_the_factor_changes_no_gradient():
    """But what f16 would have lost: in f32 not a digit."""
    base = dataclasses.replace(small(num_layers=1), precision="f32")
    with_factor = dataclasses.replace(base, scaling=ScalingConfig(loss="dynamic"))
    (metrics,), plain = run(base, {}, 1, "float32")
    (more,), scaled = run(with_factor, {}, 1, "float32")
    assert more.loss == metrics.loss and more.grad_norm == pytest.approx(metrics.grad_norm, rel=1e-6)
    assert worst(plain.opt_state[0].mu, scaled.opt_state[0].mu) < 1e-5
    assert metrics.scaled.factor is None and more.scaled.factor == 2**15


def test_going_back_keeps_the_factor():
    config = in_f16()
    model, scales = build(config, "float16", jax.random.key(0)), scaling.begin(None, config)
    now, before = (TrainState(model, None, skip.begin(), scales, jnp.int32(n)) for n in (7, 3))
    halved = scaling.after(now.scaling, None, jnp.asarray(False), jnp.float32(np.nan), config)
    on = skip.go_on(before, dataclasses.replace(now, scaling=halved))
    assert on.step == 7 and on.scaling.loss.factor == 2**14
