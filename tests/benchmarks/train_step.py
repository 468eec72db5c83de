"""A training step of the dense equivalent of `tiny` beside PyTorch's, and the mixture beside the dense layer.

    python tests/benchmarks/train_step.py            in an environment that has torch too, for the comparison with it

Everything is timed in one process, in interleaved rounds, and compared by the median ratio of a round, because the
machine's speed drifts. PyTorch's model is written for the purpose, of the same shape: grouped-query attention through
`scaled_dot_product_attention`, gated feed-forward, layer norm, tied head, AdamW; eager in f32, and `torch.compile` with
bf16 autocast, whose compile time is not counted.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import vishwamai_eqx  # noqa: F401  isort: skip
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import train
from vishwamai_eqx import logbook, moe, optim, state
from vishwamai_eqx.config import PRESETS, Config
from vishwamai_eqx.data import Batch
from vishwamai_eqx.layers import GatedMLP
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
    abstract = state.abstract_state(config.model, dtype, transform)
    specs = state.placement(abstract, sizes, transform)
    step = train.make_step(config, mesh, specs, transform)
    rng, shape = np.random.default_rng(0), (1, config.optim.batch_size, config.model.max_seq_len)
    tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    batch = jax.tree.map(jnp.asarray, Batch(tokens, np.roll(tokens, -1, axis=-1), np.ones_like(tokens), positions))
    current = state.initialise(config.model, dtype, transform, 0, state.shardings(mesh, specs))

    def run() -> None:
        nonlocal current
        current, _ = jax.block_until_ready(step(current, batch))

    return run


def torch_step(config: Config, fast: bool) -> Callable[[], None]:
    """A call that runs one step of the same model in PyTorch: eager f32, or compiled with bf16 autocast if `fast`."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    model, d = config.model, config.model.hidden_size
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, d // model.num_heads
    angles = torch.outer(
        torch.arange(model.max_seq_len), model.rope_theta ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    )
    cos, sin = angles.cos()[None, None], angles.sin()[None, None]

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv = nn.Linear(d, (heads + 2 * kv_heads) * head_dim, bias=False)
            self.out = nn.Linear(d, d, bias=False)
            self.gate_up = nn.Linear(d, 2 * model.ffn_dim, bias=False)
            self.down = nn.Linear(model.ffn_dim, d, bias=False)

        def forward(self, x):
            batch, seq, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
            q, k, v = (t.view(batch, seq, -1, head_dim).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, seq, d))
            gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * up)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(model.vocab_size, d)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.blocks = nn.ModuleList(Block() for _ in range(model.num_layers))
            self.norm = nn.LayerNorm(d)

        def forward(self, tokens, targets):
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.embedding.weight)
            return F.cross_entropy(logits.view(-1, model.vocab_size).float(), targets.view(-1))

    torch.manual_seed(0)
    torch.set_num_threads(2)
    decoder = Decoder()
    adamw = torch.optim.AdamW(decoder.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=fast)
    tokens = torch.randint(0, model.vocab_size, (config.optim.batch_size, model.max_seq_len))
    targets = tokens.roll(-1, dims=1)
    forward = torch.compile(decoder) if fast else decoder

    def run() -> None:
        adamw.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = forward(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        adamw.step()

    return run


def layer_step(layer: moe.MoE | GatedMLP, dtype: str, load: np.ndarray | None = None) -> Callable[[], None]:
    """A call that runs a layer forward and backward on the rows of a tiny batch; `load` is each expert's share."""
    tiny = PRESETS["tiny"]
    shape = (tiny.optim.batch_size, tiny.model.max_seq_len, tiny.model.hidden_size)
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
    try:
        calls |= {"torch f32": torch_step(config, fast=False), "torch compiled bf16": torch_step(config, fast=True)}
    except ImportError:
        print("torch is not installed: only this project's own figures")
    tokens = config.optim.batch_size * config.model.max_seq_len
    seconds = compare(calls, rounds)
    for name, times in seconds.items():
        results[f"{name}, tokens/s"] = round(tokens / statistics.median(times))
    for name in seconds:
        if name.startswith("torch"):
            results[f"ours bf16 over {name}"] = round(ratio(seconds, name, "ours bf16"), 3)

    tiny, key = PRESETS["tiny"].model, jax.random.key(1)
    mixture = moe.MoE(tiny.hidden_size, tiny.ffn_dim, tiny.num_experts, tiny.experts_per_token, key=key)
    dense = GatedMLP(tiny.hidden_size, tiny.ffn_dim * tiny.experts_per_token, key=key)
    for dtype in ("bfloat16", "float32"):
        layers = {"dense": layer_step(dense, dtype)}
        layers |= {name: layer_step(mixture, dtype, load) for name, load in loads.items()}
        seconds = compare(layers, 2 * rounds)
        for name in loads:
            results[f"mixture over dense layer, {dtype}, {name} load"] = round(ratio(seconds, name, "dense"), 3)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
