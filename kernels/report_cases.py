"""What `python -m kernels.report` compiles: this package's kernels, and JAX's own at the same shapes."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash

import kernels

# The package has a function of the module's name in the module's place.
megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

SHAPE = {
    "rows": 8192, "k": 768, "n": 3072, "groups": 8,
    "tokens": 8192, "choices": 2, "seq": 2048, "heads": 12, "kv_heads": 4, "head_dim": 128,
}  # fmt: skip
"""The defaults: the `base` preset's experts and attention."""
_TILE = 128


@dataclass(frozen=True)
class Case:
    """One program and the kernel in it that is looked at: that of the given name, else the one that multiplies most."""

    operation: str
    implementation: str
    blocks: str
    fn: Callable[..., Any]
    avals: tuple[Any, ...]
    kernel: str | None = None
    useful_macs: int = 0
    """Multiplications that the operation needs, without padding and masked blocks."""
    steps: float | None = None
    """How often the kernel's step runs, where its multiplications do not say it."""
    unmasked_tiles: int = 0
    """128x128 blocks of scores that are needed, for attention."""


def cases(shape: Mapping[str, int], dtype: Any) -> list[Case]:
    """Every case, in the order of the report: an operation's implementations together, and the blocks of each."""
    every = [*_grouped(shape, dtype), *_dispatch(shape, dtype), *_attention(shape, dtype)]
    order = {key: index for index, key in enumerate(dict.fromkeys(case.operation for case in every))}
    return sorted(
        every, key=lambda case: (order[case.operation], case.implementation != "pallas_tpu", case.implementation)
    )


def _grouped(shape, dtype):
    rows, k, n, groups = (shape[name] for name in ("rows", "k", "n", "groups"))
    aval = jax.ShapeDtypeStruct
    lhs, rhs, g = aval((rows, k), dtype), aval((groups, k, n), dtype), aval((rows, n), dtype)
    sizes = aval((groups,), jnp.int32)
    common = {"useful_macs": rows * k * n}

    def forms(product):
        """The product and its two gradients, one at a time."""
        yield "grouped_matmul forward", product, (lhs, rhs, sizes)
        # A gradient with respect to one side; XLA drops the product itself.
        yield "grouped_matmul d_lhs", lambda lhs, rhs, sizes, g: _pull(lambda x: product(x, rhs, sizes), lhs, g), None
        yield "grouped_matmul d_rhs", lambda lhs, rhs, sizes, g: _pull(lambda x: product(lhs, x, sizes), rhs, g), None

    def ours(lhs, rhs, sizes):
        return kernels.grouped_matmul(lhs, rhs, sizes, "pallas_tpu")

    for implementation, product in (("pallas_tpu", ours), ("lax.ragged_dot", lax.ragged_dot)):
        for operation, fn, avals in forms(product):
            avals = avals or (lhs, rhs, sizes, g)
            name = "grouped_matmul" if implementation == "pallas_tpu" else None
            yield Case(operation, implementation, "", fn, avals, name, **common)

    for rows_block, k_block, n_block in ((512, 768, 1024), (512, 1024, 1024), (256, 768, 1536), (128, 128, 128)):
        tiling = min(rows_block, rows), min(k_block, k), min(n_block, n)
        swapped = min(rows_block, rows), min(n_block, n), min(k_block, k)

        def gmm(lhs, rhs, sizes, tiling=tiling):
            return megablox.gmm(lhs, rhs, sizes, dtype, tiling)

        def gmm_transposed(g, rhs, sizes, tiling=swapped):
            return megablox.gmm(g, rhs, sizes, dtype, tiling, transpose_rhs=True)

        def tgmm(lhs, g, sizes, tiling=tiling):
            return megablox.tgmm(lhs.swapaxes(0, 1), g, sizes, dtype, tiling)

        for operation, fn, avals, blocks in (
            ("grouped_matmul forward", gmm, (lhs, rhs, sizes), tiling),
            ("grouped_matmul d_lhs", gmm_transposed, (g, rhs, sizes), swapped),
            ("grouped_matmul d_rhs", tgmm, (lhs, g, sizes), tiling),
        ):
            yield Case(operation, "megablox", "/".join(map(str, blocks)), fn, avals, **common)


def _pull(fn, primal, cotangent):
    return jax.vjp(fn, primal)[1](cotangent)[0]


def _dispatch(shape, dtype):
    tokens, choices, width, experts = (shape[name] for name in ("tokens", "choices", "k", "groups"))
    aval = jax.ShapeDtypeStruct
    x, index = aval((tokens, width), dtype), aval((tokens, choices), jnp.int32)
    weights = aval((tokens, choices), jnp.float32)

    def there(x, index):
        return kernels.moe_dispatch(x, index, experts, implementation="pallas_tpu")

    def back(x, index, weights):
        rows, plan = there(x, index)
        return kernels.moe_combine(rows, plan, weights, implementation="pallas_tpu")

    yield Case("moe_dispatch", "pallas_tpu", "", lambda *a: there(*a)[0], (x, index), "moe_dispatch_rows")
    yield Case("moe_combine", "pallas_tpu", "", back, (x, index, weights), "moe_dispatch_sum")


def _attention(shape, dtype):
    seq, heads, kv_heads, head_dim = (shape[name] for name in ("seq", "heads", "kv_heads", "head_dim"))
    aval = jax.ShapeDtypeStruct
    segments = aval((seq,), jnp.int32)
    tiles = seq // _TILE * (seq // _TILE + 1) // 2 * heads
    common = {"useful_macs": tiles * 2 * _TILE**2 * head_dim, "unmasked_tiles": tiles}

    for block in (512, 1024):
        block = min(block, seq)
        visited = seq // block * (seq // block + 1) // 2 * heads

        def flash(q, k, v, segments, block=block):
            sizes = jax_flash.BlockSizes(block_q=block, block_k_major=block, block_k=block, block_b=1)
            ids = jax_flash.SegmentIds(segments[None], segments[None])
            return jax_flash.flash_attention(q, k, v, segment_ids=ids, causal=True, block_sizes=sizes)

        # It has no grouped queries: keys and values as many as queries.
        q = aval((1, heads, seq, head_dim), dtype)
        yield Case(
            "flash_attention forward", "jax flash", f"{block}/{block}", flash, (q, q, q, segments), None, steps=visited,
            **common,
        )  # fmt: skip

        def splash(q, k, v, segments, block=block):
            compute = min(512, block)
            sizes = jax_splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=compute)
            mask = jax_splash.MultiHeadMask([jax_splash.CausalMask((seq, seq))] * heads)
            attend = jax_splash.make_splash_mha_single_device(mask, block_sizes=sizes)
            return attend(q, k, v, segment_ids=jax_splash.SegmentIds(segments, segments))

        q, k = aval((heads, seq, head_dim), dtype), aval((kv_heads, seq, head_dim), dtype)
        yield Case(
            "flash_attention forward", "jax splash", f"{block}/{block}/{min(512, block)}", splash, (q, k, k, segments),
            None, steps=visited, **common,
        )  # fmt: skip
