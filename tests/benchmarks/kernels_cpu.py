"""What the kernels cost on this CPU, as ratios of interleaved rounds: `python -m tests.benchmarks.kernels_cpu`.

Forward and backward of: the mixture layer over a dense gated layer of equal active FLOPs (goal: at most 1.5), flash
attention over the naive form differentiated by JAX, and gemm over a plain product differentiated by JAX. A ratio is
that of the smallest times, so that what else the machine does matters little; `--cpu-time` measures the process's own
time instead of the clock's, for a machine that is never quiet.
"""

import argparse
import ctypes
import json
import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
if sys.platform == "linux":
    # As in training: glibc otherwise maps large buffers anew at every call (M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX).
    libc = ctypes.CDLL(None)
    for parameter, value in ((-4, 0), (-1, -1), (-8, 1)):
        libc.mallopt(parameter, value)

import jax
import jax.numpy as jnp
import numpy as np

import kernels

BATCH, SEQ, D_MODEL, D_FF, EXPERTS, CHOICES = 16, 256, 256, 384, 8, 2
TOKENS = BATCH * SEQ


def best_times(functions, arguments, rounds, clock):
    """The smallest seconds of each function, the rounds of all of them interleaved."""
    compiled = {name: jax.jit(function).lower(*arguments).compile() for name, function in functions.items()}
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in compiled.items():
            start = clock()
            jax.block_until_ready(function(*arguments))
            best[name] = min(best[name], clock() - start)
    return best


def trained(forward, count):
    """Value and gradients in the first `count` arguments of a loss that no part of the forward pass drops out of."""
    return jax.value_and_grad(lambda *a: jnp.sum(forward(*a).astype(jnp.float32) ** 2), argnums=tuple(range(count)))


def gated(gate, up):
    """silu(gate) up in f32: in bf16 XLA's CPU code rounds after every operation and takes twice as long."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def mixture(x, weights, gate, up, down, index):
    """The mixture layer as the model has it."""
    rows, plan = kernels.moe_dispatch(x.reshape(TOKENS, D_MODEL), index, EXPERTS)

    def product(lhs, rhs):
        return kernels.grouped_matmul(lhs, rhs, plan.group_sizes, row_alignment=plan.row_alignment)

    hidden = product(gated(product(rows, gate), product(rows, up)), down)
    return kernels.moe_combine(hidden, plan, weights).reshape(x.shape)


def dense(x, gate, up, down):
    """A gated layer whose width is that of the experts a token meets."""
    return kernels.gemm(gated(kernels.gemm(x, gate), kernels.gemm(x, up)), down)


def mixture_ratio(dtype, load, rounds, clock):
    """Time of the mixture layer over the dense one."""
    generator = np.random.default_rng(0)
    share = np.ones(EXPERTS) if load == "balanced" else 1 / np.arange(1, EXPERTS + 1)
    scores = np.log(share) + generator.gumbel(size=(TOKENS, EXPERTS))
    index = jnp.asarray(np.argsort(-scores, axis=1)[:, :CHOICES], jnp.int32)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(generator.normal(size=shape) / 16, dtype)

    x, weights = normal(BATCH, SEQ, D_MODEL, dtype=dtype), jnp.full((TOKENS, CHOICES), 0.5)
    width = CHOICES * D_FF
    sparse = [normal(EXPERTS, *shape) for shape in ((D_MODEL, D_FF), (D_MODEL, D_FF), (D_FF, D_MODEL))]
    full = [normal(*shape) for shape in ((D_MODEL, width), (D_MODEL, width), (width, D_MODEL))]
    both = {
        "mixture": lambda x, index, weights, sparse, full: trained(mixture, 5)(x, weights, *sparse, index),
        "dense": lambda x, index, weights, sparse, full: trained(dense, 4)(x, *full),
    }
    best = best_times(both, (x, index, weights, sparse, full), rounds, clock)
    return best["mixture"] / best["dense"]


def naive_attention(q, k, v, segment_ids):
    """The whole score matrix, repeated kv heads, softmax in f32, gradients by JAX."""
    group, seq = q.shape[2] // k.shape[2], q.shape[1]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & jnp.tril(jnp.ones((seq, seq), bool))
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), axis=-1).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def attention_ratio(dtype, seq, rounds, clock):
    """Time of the XLA form over the naive one."""
    generator = np.random.default_rng(0)
    q, k, v = (jnp.asarray(generator.normal(size=(BATCH, seq, heads, 64)), dtype) for heads in (4, 2, 2))
    segment_ids = jnp.asarray(np.sort(generator.integers(0, 3, (BATCH, seq)), axis=1), jnp.int32)

    def flash(q, k, v, segment_ids):
        return kernels.flash_attention(q, k, v, segment_ids=segment_ids, implementation="xla")

    both = {"flash": trained(flash, 3), "naive": trained(naive_attention, 3)}
    best = best_times(both, (q, k, v, segment_ids), rounds, clock)
    return best["flash"] / best["naive"]


def gemm_ratio(dtype, k, n, rounds, clock):
    """Time of the XLA form over the plain product."""
    generator = np.random.default_rng(0)
    x, w = jnp.asarray(generator.normal(size=(BATCH, SEQ, k)), dtype), jnp.asarray(generator.normal(size=(k, n)))

    def product(implementation):
        return trained(lambda x, w: kernels.gemm(x, w, implementation=implementation), 2)

    best = best_times({name: product(name) for name in ("xla", "reference")}, (x, w), rounds, clock)
    return best["xla"] / best["reference"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--cpu-time", action="store_true", help="the process's own time instead of the clock's")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    measured = options.rounds, time.process_time if options.cpu_time else time.perf_counter
    ratios = {}

    def record(name, ratio):
        ratios[name] = ratio
        if not options.json:
            print(f"{ratio:6.2f}  {name}", flush=True)

    for name, dtype in (("bf16", jnp.bfloat16), ("f32", jnp.float32)):
        for load in ("balanced", "zipf"):
            record(f"mixture over dense, {load}, {name}", mixture_ratio(dtype, load, *measured))
        for seq in (256, 512):
            record(f"flash over naive, seq {seq}, {name}", attention_ratio(dtype, seq, *measured))
        for k, n in ((256, 768), (768, 256)):
            record(f"gemm over plain, {k}x{n}, {name}", gemm_ratio(dtype, k, n, min(options.rounds, 5), measured[1]))
    if options.json:
        print(json.dumps({"jax": jax.__version__, "ratios": ratios}))


if __name__ == "__main__":
    main()
