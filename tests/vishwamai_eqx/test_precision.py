"""What is computed in fp8: which weights, how they cross the wire, what is kept, and that a mesh changes nothing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.moe_dispatch.plan import default_alignment, padded_rows
from tests.small import random_batch, small, worst
from tests.test_train import run
from vishwamai_eqx.architecture import abstract, build
from vishwamai_eqx.config import ScalingConfig
from vishwamai_eqx.layers import TPUGEMMLinear
from vishwamai_eqx.mesh import P, gather, make_mesh, place, sum_over
from vishwamai_eqx.parameters import declarations


def with_precision(precision, **settings):
    return dataclasses.replace(small(**settings), precision=precision)


def test_the_weights_of_blocks_may_be_in_fp8_but_the_routers():
    declared = jax.tree_util.tree_leaves_with_path(declarations(abstract(with_precision("fp8"), "bfloat16")))
    names = {jax.tree_util.keystr(path, simple=True, separator=".") for path, it in declared if it.fp8 == 128}
    attention = {f"blocks.attention.{name}.weight" for name in ("query", "key", "value", "out")}
    assert names == attention | {f"blocks.experts.{name}" for name in ("gate", "up", "down")}


def test_a_layer_that_does_not_permit_it_stays_in_the_compute_type():
    linear = TPUGEMMLinear(8, 4, False, use_fp8=False, key=jax.random.key(0))
    assert isinstance(gather(linear, None, jnp.bfloat16, fp8=ScalingConfig()).weight, jax.Array)


# Shards of 256 rows are whole blocks and cross the wire in bytes, with their scales. Those of 48 are not, and cross it
# in the compute type, of which XLA makes f32 on CPU.
@pytest.mark.parametrize(("width", "on_wire"), [(512, {"u8[512,512]", "f32[4,4]"}), (96, {"f32[96,96]"})])
def test_weights_are_gathered_in_fp8_and_are_those_of_one_device(width, on_wire):
    linear = TPUGEMMLinear(width, width, False, key=jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (2, 8, width), jnp.bfloat16)

    def loss(linear, x, placement):
        whole = gather(linear, placement, jnp.bfloat16, fp8=ScalingConfig())
        weight = jax.lax.stop_gradient(whole.weight[:2])
        return sum_over(jnp.sum(whole(x).astype(jnp.float32) ** 2), "data"), jax.tree.map(lambda a: a[None], weight)

    def results(sizes):
        mesh = make_mesh(sizes)
        placement = place(linear, dict(mesh.shape))
        rows = P("data") if mesh.size > 1 else P()
        step = jax.shard_map(
            lambda linear, x: jax.value_and_grad(loss, (0, 1), has_aux=True)(linear, x, placement),
            mesh=mesh,
            in_specs=(placement, rows),
            out_specs=((P(), rows), (placement, rows)),
        )
        compiled = jax.jit(step).lower(linear, x).compile()
        return jax.device_get(jax.jit(step)(linear, x)), compiled.as_text()

    ((value, weights), (dw, dx)), text = results({"data": 2})
    ((expected, weight), (wanted_dw, wanted_dx)), _ = results({})
    for got, want in zip(weights, weight, strict=True):
        np.testing.assert_array_equal(got.astype(np.float32), np.concatenate([want] * 2).astype(np.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(dx, wanted_dx)
    assert worst(wanted_dw.weight, dw.weight) < 0.01  # in bf16 on the wire
    assert set(re.findall(r"= (\w+\[[\d,]*\])\S* all-gather\(", text)) == on_wire


def test_a_step_in_fp8_is_the_same_on_every_mesh():
    """But for the order of sums, after which a number may be rounded to its other neighbour."""
    model = {"hidden_size": 256, "ffn_dim": 128}
    (expected,), _ = run(with_precision("fp8", **model), {}, 1, "bfloat16")
    (found,), _ = run(with_precision("fp8", **model), {"data": 2, "expert": 2, "model": 2}, 1, "bfloat16")
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-4)
    np.testing.assert_allclose(found.grad_norm, expected.grad_norm, rtol=1e-2)
    (wide,), _ = run(with_precision("bf16", **model), {}, 1, "bfloat16")
    assert 1e-4 < abs(wide.grad_norm / expected.grad_norm - 1) < 0.1  # it is fp8, and near


def test_what_is_kept_of_products_is_half_as_much_in_fp8():
    """By the policy that keeps their inputs: a byte and a 128th of a scale for each number, not bf16's two bytes."""
    batch = jax.tree.map(jnp.asarray, random_batch(4, 64, 0))

    def kept(precision, remat):
        config = with_precision(precision, hidden_size=256, ffn_dim=256, remat=remat)
        model = build(config, "bfloat16", jax.random.key(0))

        def loss(model):
            hidden, _, _ = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions)
            return jnp.sum(hidden.astype(jnp.float32) ** 2)

        pull = jax.eval_shape(lambda model: jax.vjp(loss, model)[1], model)
        of_layers = (it for it in jax.tree.leaves(pull) if it.ndim > 2 and it.shape[0] == 2)
        return sum(it.size * it.dtype.itemsize for it in of_layers)

    wide, narrow = (kept(precision, "inputs") - kept(precision, "full") for precision in ("bf16", "fp8"))
    # What goes into attention, its result, and by expert what goes into gate and up, and into down.
    routed = padded_rows(4 * 64 * 2, 8, default_alignment(4 * 64 * 2, 8))
    numbers = 2 * (4 * 64 * (256 + 256) + routed * (256 + 256))
    assert wide == 2 * numbers
    assert narrow == numbers + 4 * numbers // 128
