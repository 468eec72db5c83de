"""How fast text is written: beside what the machine can move and multiply, and beside transformers.

    python tests/benchmarks/generation.py                          a Gemma of about 100M parameters, f32, on CPU
    python tests/benchmarks/generation.py --torch /venv/bin/python  and transformers' generate with a static cache

Each figure is the best of several rounds, taken in turns, because the machine is shared.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import vishwamai_eqx  # noqa: F401  isort: skip  (before jax, whose platform it chooses)

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from vishwamai_eqx import decode, gemma
from vishwamai_eqx.apart import apart
from vishwamai_eqx.engine import Engine, Request
from vishwamai_eqx.gemma_config import GemmaConfig
from vishwamai_eqx.sampling import Sampling

# Gemma's shape: one head of keys and values, wide feed-forward, tied embedding.
SHAPE = {"vocab_size": 32_000, "hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 12}
SHAPE |= {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 128}
PROMPT, NEW = 128, 64

TORCH = """
import json, sys, time, torch
from transformers import GemmaConfig, GemmaForCausalLM
shape, batch, prompt, new, rounds = json.loads(sys.argv[1])
model = GemmaForCausalLM(GemmaConfig(**shape, max_position_embeddings=8192)).float().eval()
tokens = torch.randint(4, shape["vocab_size"], (batch, prompt))
best = None
for n in (1, new):
    options = dict(do_sample=False, cache_implementation="static", eos_token_id=None, pad_token_id=0)
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(tokens, max_new_tokens=n, min_new_tokens=n, **options)
        times.append(time.perf_counter() - start)
    best = min(times) if best is None else min(times) - best
print(batch * (new - 1) / best)
"""


def best(run, rounds):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def products(model, batch):
    """The products of all the weights, each a matrix of its own, with vectors that depend on each other; no more."""
    (layers,) = model.period
    attention, mlp = layers.attention, layers.mlp
    linears = [attention.query, attention.key, attention.value, attention.out, mlp.gate, mlp.up, mlp.down]
    weights = [[jnp.array(layer) for layer in linear.weight] for linear in linears]

    @jax.jit
    def run(weights, head, x):
        def layer(x, weights):
            q, k, v, out, gate, up, down = (
                lambda x, w=w, flip=linear.transposed: x @ (w.T if flip else w)
                for w, linear in zip(weights, linears, strict=True)
            )
            x = x + out(q(x)) + jnp.sum(k(x)) + jnp.sum(v(x))
            return x + down(gate(x) * up(x))

        def step(x, _):
            for each in zip(*weights, strict=True):
                x = layer(x, each)
            x = x / (1 + jnp.abs(x).max())
            return x + (x @ head.T).max(axis=-1, keepdims=True) * 1e-6, None

        return jax.lax.scan(step, x, length=decode.STRIDE)[0]

    return lambda: run(weights, model.embedding.weight, jnp.ones((batch, model.config.hidden_size)))


def writing(model, batch, rounds):
    """Strides of `batch` rows behind their prompts."""
    engine = Engine(apart(model), eos_id=-1, slots=batch)
    rng = np.random.default_rng(0)
    for _ in range(batch):
        prompt = rng.integers(4, SHAPE["vocab_size"], PROMPT).tolist()
        engine.submit(Request(prompt, Sampling(0.0), max_new_tokens=decode.STRIDE * (rounds + 2)))
    events = engine.events()

    def run():
        for _ in range(batch):
            next(events)

    run()
    return run


def copying(model, rounds):
    """A model of the same shape that writes a text again and again, with and without prompt lookup."""
    cycle = 4 + np.random.default_rng(0).permutation(200)
    follows = np.arange(SHAPE["vocab_size"])
    follows[cycle] = np.roll(cycle, -1)
    embedding = np.asarray(model.embedding.weight)
    head = np.empty_like(embedding)
    head[follows] = embedding
    (layers,) = model.period
    branches = layers.attention.out.weight, layers.mlp.down.weight
    model = eqx.tree_at(
        lambda model: (model.period[0].attention.out.weight, model.period[0].mlp.down.weight, model.untied_head),
        model,
        (*map(jnp.zeros_like, branches), eqx.tree_at(lambda it: it.weight, model.embedding, jnp.asarray(head))),
        is_leaf=lambda leaf: leaf is None,
    )
    prompt, strides = np.resize(cycle, 250).tolist(), rounds + 1
    speeds = []
    for drafts in (0, 4):
        engine = Engine(apart(model), eos_id=-1, slots=1, drafts=drafts)
        number = engine.submit(Request(prompt, Sampling(0.0), decode.STRIDE * (drafts + 1) * strides))
        written, times, events = [], [], engine.events()
        for _ in range(strides):
            start = time.perf_counter()
            event = next(events)
            times.append((time.perf_counter() - start) / len(event.tokens))
            written += event.tokens
        engine.cancel(number)
        assert written == np.resize(np.roll(cycle, -50), len(written)).tolist()
        speeds.append(1 / min(times))
    print(
        f"copying: {speeds[0]:.1f} tokens/s, with prompt lookup {speeds[1]:.1f}: {speeds[1] / speeds[0]:.2f} times, "
        f"{engine.acceptance:.0%} of the guesses accepted",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", type=int, nargs="*", default=[1, 16])
    options = parser.parse_args()
    config = GemmaConfig("gemma", *SHAPE.values(), max_position_embeddings=8192)
    model = jax.jit(lambda: gemma.Decoder(config, key=jax.random.key(0)))()
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    print(f"{count:,} parameters in f32, {count * 4 / 1e6:.0f} MB", flush=True)
    for batch in options.only:
        bare, ours = products(model, batch), writing(model, batch, options.rounds)
        bare_times, our_times = [], []
        for _ in range(options.rounds):
            bare_times.append(best(bare, 1))
            our_times.append(best(ours, 1))
        bare_time, our_time = min(bare_times), min(our_times)
        print(
            f"batch {batch}: {batch * decode.STRIDE / our_time:.1f} tokens/s, "
            f"{our_time / decode.STRIDE * 1e3:.1f} ms a step; bare products {bare_time / decode.STRIDE * 1e3:.1f} ms, "
            f"{count * 4 * decode.STRIDE / bare_time / 1e9:.1f} GB/s: {bare_time / our_time:.1%} of them",
            flush=True,
        )
        if options.torch:
            given = json.dumps([SHAPE, batch, PROMPT, NEW, 2])
            run = subprocess.run([options.torch, "-c", TORCH, given], capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr)
            theirs = float(run.stdout)
            print(
                f"  transformers {theirs:.1f} tokens/s: ratio {batch * decode.STRIDE / our_time / theirs:.2f}",
                flush=True,
            )
    copying(model, options.rounds)
    read(model, options.rounds)


def read(model, rounds):
    """Reading prompts beside a forward pass of training."""
    rows, length = 4, 512
    rng = np.random.default_rng(0)

    @jax.jit
    def forward(tokens):
        hidden, _, _ = model(tokens)
        return hidden.sum()

    forward_times, our_times = [], []
    engine = Engine(apart(model), eos_id=-1, slots=rows)
    for _ in range(rounds + 1):
        tokens = rng.integers(4, SHAPE["vocab_size"], (rows, length))
        forward_times.append(best(lambda tokens=tokens: forward(tokens), 1))
        for row in tokens:
            engine.submit(Request(row.tolist(), Sampling(0.0), 1))

        def prompts():
            engine._admit()
            while any(slot.unread for slot in engine.slots):
                engine._read_chunk()
            return engine.rows

        our_times.append(best(prompts, 1))
        for _ in engine.events():
            pass
    forward_time, our_time = min(forward_times), min(our_times)
    print(
        f"reading: {rows * length / our_time:,.0f} tokens/s, a forward pass {rows * length / forward_time:,.0f}: "
        f"{forward_time / our_time:.1%}"
    )


if __name__ == "__main__":
    main()
