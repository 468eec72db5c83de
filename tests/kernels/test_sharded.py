"""Inside shard_map with checked varying axes: values and gradients on eight devices equal those on one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kernels
from kernels.flash_attention import tiles, xla
from tests.kernels.comparison import assert_close, normal

SEGMENTS = jnp.repeat(jnp.asarray([[0, 0, 1, 1]]), 6, axis=1).repeat(8, axis=0)


def attention(x, w, row):
    """Queries, keys and values from replicated weights, with dropout that knows where its shard begins."""
    q, k, v = (kernels.gemm(x, w[name], implementation="xla").reshape(*x.shape[:2], -1, 8) for name in "qkv")
    segments = jax.lax.dynamic_slice_in_dim(SEGMENTS, row, x.shape[0])
    out = kernels.flash_attention(
        q,
        k,
        v,
        segment_ids=segments,
        dropout_rate=0.2,
        dropout_key=jax.random.key(3),
        dropout_offset=(row, 0),
        implementation="xla",
    )
    return out.reshape(x.shape)


def replicated_keys(x, w, row):
    """Keys and values that every device shares, with the log-sum-exp in the loss."""
    k, v = (jnp.broadcast_to(w[name][:, None, :8], (x.shape[0], 16, 1, 8)) for name in ("k", "v"))
    out, lse = kernels.flash_attention(
        x.reshape(*x.shape[:2], 2, 8), k, v, causal=False, return_lse=True, implementation="xla"
    )
    return out.reshape(x.shape) + jnp.mean(lse, axis=(1, 2))[:, None, None]


def experts(x, w, row):
    """Replicated experts over each device's own tokens."""
    tokens = x.reshape(-1, x.shape[-1])
    index = jnp.argsort(tokens @ w["router"], axis=1)[:, :2].astype(jnp.int32)
    rows, plan = kernels.moe_dispatch(tokens, index, 4, implementation="xla")
    hidden = kernels.grouped_matmul(rows, w["experts"], plan.group_sizes, "xla", row_alignment=plan.row_alignment)
    hidden = kernels.grouped_matmul(hidden, w["experts"], plan.group_sizes, "xla")
    weights = jax.nn.softmax(tokens @ w["router"])[:, :2]
    return kernels.moe_combine(hidden, plan, weights, implementation="xla").reshape(x.shape)


def fp8(x, w, row):
    """Replicated weights, in blocks that no device's rows cut."""
    return kernels.fp8_gemm(x, w["q"], block_size=8, implementation="xla")


def weights():
    shapes = {"q": (16, 16), "k": (16, 8), "v": (16, 8), "router": (16, 4), "experts": (4, 16, 16)}
    return {name: normal(seed, shape) / 4 for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("regime", ["short", "tiles"])
@pytest.mark.parametrize("layer", [attention, replicated_keys, experts, fp8], ids=lambda f: f.__name__)
def test_eight_devices_equal_one(layer, regime, monkeypatch):
    if regime == "tiles":
        if layer in (experts, fp8):
            pytest.skip("one regime")
        monkeypatch.setattr(xla, "SHORT", 0)
        monkeypatch.setattr(tiles, "QUERIES", 16)
        monkeypatch.setattr(tiles, "KEYS", 16)
    x = normal(9, (8, 24, 16))

    def step(x, w):
        def loss(x, w):
            y = layer(x, w, jax.lax.axis_index("data") * x.shape[0])
            return jax.lax.psum(jnp.sum(y**2), "data"), y

        (value, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)
        return value, y, gradients

    results = []
    for devices in (1, 8):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        specs = {"in_specs": (P("data"), P()), "out_specs": (P(), P("data"), (P("data"), P()))}
        results.append(jax.device_get(jax.jit(jax.shard_map(step, mesh=mesh, check_vma=True, **specs))(x, weights())))
    assert_close(results[1], results[0], jnp.float32, layer.__name__)
