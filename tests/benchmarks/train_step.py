"""A training step of the dense equivalent of `tiny` beside PyTorch's, and the mixture beside the dense layer.

    python -m tests.benchmarks.train_step            in an environment that has torch too, for the comparison with it

Everything is timed in interleaved rounds and compared by the median ratio of a round, because the machine's speed
drifts. PyTorch's model (`torch_step.py`) is of the same shape, eager in f32 and compiled with bf16 autocast, compile
time not counted, each in a process of its own as its users have it: this project's allocator settings speed PyTorch
up as well.
"""

import argparse
import atexit
import dataclasses
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import vishwamai_eqx  # noqa: F401  isort: skip
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import kernels
import train
from kernels.compat import narrow_dot
from vishwamai_eqx import logbook, moe, optim, state
from vishwamai_eqx.config import PRESETS, Config
from vishwamai_eqx.data import Batch
from vishwamai_eqx.layers import GatedMLP, gated
from vishwamai_eqx.mesh import make_mesh


def dense_tiny() -> Config:
    """Preset tiny with one expert as wide as the experts that a token meets, and so of equal active FLOPs."""
    tiny = PRESETS["tiny"]
    width = tiny.model.ffn_dim * tiny.model.experts_per_token
    return dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, num_experts=1, ffn_dim=width))


def vishwamai_step(config: Config, dtype: str) -> Callable[[], None]:
    """A call that runs one step of train.py."""
    sizes = {"data": 1}
    mesh, transform = make_mesh(sizes), optim.optimizer(config.optim)
    abstract = state.abstract_state(config, dtype, transform)
    specs = state.placement(abstract, sizes, transform)
    step = train.make_step(config, mesh, specs, transform)
    rng, shape = np.random.default_rng(0), (1, config.optim.batch_size, config.model.max_seq_len)
    tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    batch = jax.tree.map(jnp.asarray, Batch(tokens, np.roll(tokens, -1, axis=-1), np.ones_like(tokens), positions))
    current = state.initialise(config, dtype, transform, state.shardings(mesh, specs))

    def run() -> None:
        nonlocal current
        current, _ = jax.block_until_ready(step(current, batch))

    return run


def torch_step(config: Config, compiled: bool) -> Callable[[], None]:
    """A call that runs one step of the same model in PyTorch: eager f32, or compiled with bf16 autocast."""
    model = config.model
    settings = {"vocab": model.vocab_size, "d": model.hidden_size, "layers": model.num_layers}
    settings |= {"heads": model.num_heads, "kv_heads": model.num_kv_heads, "ffn": model.ffn_dim}
    settings |= {"seq": model.max_seq_len, "theta": model.rope_theta, "rows": config.optim.batch_size}
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("torch_step.py"), json.dumps(settings | {"compiled": compiled})],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    atexit.register(process.kill)

    def run() -> None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        if not process.stdout.readline():
            raise RuntimeError("PyTorch's process has ended")

    return run


def layer_step(layer: moe.MoE | GatedMLP, width: int, dtype: str, load: np.ndarray | None = None) -> Callable[[], None]:
    """A call that runs a layer forward and backward on a tiny batch's tokens; `load` is each expert's share."""
    tiny = PRESETS["tiny"]
    shape = (tiny.optim.batch_size, tiny.model.max_seq_len, width)
    x, g = jax.random.normal(jax.random.key(0), (2, *shape), dtype)
    if load is not None:
        # The last feature is a constant, whose router weights are the logarithms of the shares; the others are noise as
        # wide as a Gumbel variable, so that each token draws its experts by about these shares.
        x = x.at[..., -1].set(1)
        noise = 1.28 / shape[-1] ** 0.5 * jax.random.normal(jax.random.key(2), (shape[-1], len(load)))
        router = noise.at[-1].set(jnp.log(jnp.asarray(load) + 1e-6))
        layer = eqx.tree_at(lambda layer: layer.router.weight, layer, router)

    def loss(layer, x):
        y = layer(x, jnp.ones(shape[:2]))[0] if isinstance(layer, moe.MoE) else layer(x)
        return jnp.sum((y * g).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    return lambda: jax.block_until_ready(gradient(layer, x))


def mixture_parts(layer: moe.MoE, width: int, dtype: str) -> dict[str, Callable[[], None]]:
    """Calls that run what no arrangement of blocks avoids, each forward and backward and alone.

    Without dropping a token under some load, static blocks hold rows + experts * (block - 1) rows. `products` are those
    of these rows, their weights gathered beforehand and the gradients of these left block by block.
    """
    tiny = PRESETS["tiny"]
    shape = (tiny.optim.batch_size, tiny.model.max_seq_len, width)
    experts, tokens = layer.gate.shape[0], shape[0] * shape[1]
    x, g = jax.random.normal(jax.random.key(0), (2, *shape), dtype)
    index, weights, _ = eqx.filter_jit(layer.router)(x, jnp.ones(shape[:2]))
    index, weights = index.reshape(tokens, -1), weights.reshape(tokens, -1)
    rows, plan = jax.jit(kernels.moe_dispatch, static_argnums=2)(x.reshape(tokens, width), index, experts)
    blocks = rows.reshape(-1, plan.row_alignment, width)
    matrices = [w.astype(dtype)[jnp.arange(len(blocks)) % experts] for w in (layer.gate, layer.up, layer.down)]

    def route(router, x):
        return jnp.sum(router(x, jnp.ones(shape[:2]))[1] * jnp.arange(index.shape[1]))

    def move(x, weights):
        rows, plan = kernels.moe_dispatch(x, index, experts)
        y = kernels.moe_combine(rows * 2, plan, weights)
        return jnp.sum((y * g.reshape(y.shape)).astype(jnp.float32))

    def multiply(matrices, blocks):
        gate, up, down = matrices
        hidden = gated(layer.activation, blocked(blocks, gate, False), blocked(blocks, up, False))
        return jnp.sum((blocked(hidden, down, True) * blocks).astype(jnp.float32))

    def call(function, *arguments):
        gradient = jax.jit(jax.grad(function, (0, 1)))
        return lambda: jax.block_until_ready(gradient(*arguments))

    return {
        "products": call(multiply, matrices, blocks),
        "router": call(route, layer.router, x),
        "dispatch and combine": call(move, x.reshape(tokens, width), weights),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def blocked(x: jax.Array, w: jax.Array, transposed: bool) -> jax.Array:
    """x[b] @ w[b], or x[b] @ w[b].T, with gradients in the forms that `grouped_matmul` takes on CPU."""
    return narrow_dot(x, w, ((2,), (2 if transposed else 1,)), ((0,), (0,)))


def _blocked_backward(transposed, saved, g):
    x, w = saved
    dx = narrow_dot(g, w, ((2,), (1 if transposed else 2,)), ((0,), (0,)))
    first, second = (side.reshape(len(x), 2, -1, side.shape[2]) for side in ((g, x) if transposed else (x, g)))
    dw = jax.lax.dot_general(first, second, (((1, 2), (1, 2)), ((0,), (0,))), preferred_element_type=jnp.float32)
    return dx, jax.lax.optimization_barrier(dw).astype(w.dtype)


blocked.defvjp(lambda x, w, transposed: (blocked(x, w, transposed), (x, w)), _blocked_backward)


def zipf(experts: int) -> np.ndarray:
    """Shares as 1, 1/2, 1/3, ..."""
    share = 1 / np.arange(1, experts + 1)
    return share / share.sum()


def trained_load(run_dir: Path) -> np.ndarray:
    """The shares of the most uneven layer at the last step of a run."""
    rows = logbook.connect(run_dir).sql(
        "SELECT layer, list(load ORDER BY expert) FROM experts "
        "WHERE step = (SELECT max(step) FROM experts) GROUP BY layer"
    )
    return max((np.array(load) for _, load in rows.fetchall()), key=np.max)


def compare(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times as long `slow` takes as `fast`: the median over rounds."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--run-dir", type=Path, help="a run of preset tiny, whose routers' last load is used too")
    arguments = parser.parse_args()
    rounds, loads = arguments.rounds, {"even": np.full(8, 1 / 8), "zipf": zipf(8)}
    if arguments.run_dir is not None:
        loads["trained"] = trained_load(arguments.run_dir)
    config, results = dense_tiny(), {"jax": jax.__version__}

    calls = {"ours bf16": vishwamai_step(config, "bfloat16"), "ours f32": vishwamai_step(config, "float32")}
    if importlib.util.find_spec("torch") is not None:
        calls |= {"torch f32": torch_step(config, False), "torch compiled bf16": torch_step(config, True)}
    else:
        print("torch is not installed: only this project's own figures")
    tokens = config.optim.batch_size * config.model.max_seq_len
    seconds = compare(calls, rounds)
    for name, times in seconds.items():
        results[f"{name}, tokens/s"] = round(tokens / statistics.median(times))
    for name in seconds:
        if name.startswith("torch"):
            results[f"ours bf16 over {name}"] = round(ratio(seconds, name, "ours bf16"), 3)

    key = jax.random.key(1)
    for preset in ("tiny", "base"):
        model = PRESETS[preset].model
        shape = model.hidden_size, model.ffn_dim, model.num_experts, model.experts_per_token
        mixture = moe.MoE(*shape, key=key)
        dense = GatedMLP(model.hidden_size, model.ffn_dim * model.experts_per_token, key=key)
        for dtype in ("bfloat16", "float32"):
            layers = {"dense": layer_step(dense, model.hidden_size, dtype)}
            layers |= {name: layer_step(mixture, model.hidden_size, dtype, load) for name, load in loads.items()}
            parts = mixture_parts(mixture, model.hidden_size, dtype)
            seconds = compare(layers | parts, rounds)
            for name in loads:
                results[f"mixture over dense layer, {preset}, {dtype}, {name} load"] = round(
                    ratio(seconds, name, "dense"), 3
                )
            for name in parts:
                results[f"  of it at least {name}, {preset}, {dtype}"] = round(ratio(seconds, name, "dense"), 3)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
