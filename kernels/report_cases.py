"""What `python -m kernels.report` compiles: this package's kernels, and JAX's own at the same shapes."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash

import kernels
from kernels.flash_attention.pallas_blocks import default_blocks
from kernels.flash_attention.pallas_tables import DIAGONAL, FULL, MASKED, schedule
from kernels.flash_attention.problem import Operands, Settings
from kernels.gemm.blocks import scaled_blocks
from kernels.moe_dispatch.pallas_tpu import STEP
from kernels.moe_dispatch.plan import default_alignment, padded_rows
from kernels.tpu import Generation

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
    kernels: tuple[str, ...] = ()
    """What the kernels' names contain, whose cycles are added; none: the one that multiplies most."""
    useful_macs: int = 0
    """Multiplications that the operation needs, without padding and masked blocks."""
    visits: tuple[float, ...] = ()
    """How often each form of a kernel's step runs, in the program's order, where its multiplications do not say it."""
    unmasked_tiles: int = 0
    """128x128 blocks of scores that are needed, for attention."""
    step_tiles: int = 1
    """Those that a step computes."""


def cases(shape: Mapping[str, int], dtype: Any, generation: Generation) -> list[Case]:
    """Every case, in the order of the report: an operation's implementations together, and the blocks of each.

    Where a generation has no bf16 product, JAX's Pallas kernels are given f32 numbers.
    """
    every = [
        *_grouped(shape, dtype, generation),
        *_dispatch(shape, dtype),
        *_attention(shape, dtype, generation),
        *_gemm(shape, dtype, generation),
    ]
    order = {key: index for index, key in enumerate(dict.fromkeys(case.operation for case in every))}
    return sorted(
        every, key=lambda case: (order[case.operation], case.implementation != "pallas_tpu", case.implementation)
    )


def _grouped(shape, dtype, generation):
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
            names = ("grouped_matmul",) if implementation == "pallas_tpu" else ()
            yield Case(operation, implementation, "", fn, avals, names, **common)

    if not generation.bf16_dot:
        dtype = jnp.dtype(jnp.float32)
        lhs, rhs, g = (aval(x.shape, dtype) for x in (lhs, rhs, g))

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
            yield Case(operation, _label("megablox", dtype), "/".join(map(str, blocks)), fn, avals, **common)


def _pull(fn, primal, cotangent):
    return jax.vjp(fn, primal)[1](cotangent)[0]


def _dispatch(shape, dtype):
    tokens, choices, width, experts = (shape[name] for name in ("tokens", "choices", "k", "groups"))
    aval = jax.ShapeDtypeStruct
    x, index = aval((tokens, width), dtype), aval((tokens, choices), jnp.int32)
    weights = aval((tokens, choices), jnp.float32)
    rows = padded_rows(tokens * choices, experts, default_alignment(tokens * choices, experts))

    def there(x, index):
        return kernels.moe_dispatch(x, index, experts, implementation="pallas_tpu")

    def back(x, index, weights):
        rows, plan = there(x, index)
        return kernels.moe_combine(rows, plan, weights, implementation="pallas_tpu")

    for operation, fn, avals, kernel, steps in (
        ("moe_dispatch", lambda *a: there(*a)[0], (x, index), "moe_dispatch_rows", rows / STEP),
        ("moe_combine", back, (x, index, weights), "moe_dispatch_sum", tokens / STEP),
    ):
        yield Case(operation, "pallas_tpu", "", fn, avals, (kernel,), visits=(steps,))


def _attention(shape, dtype, generation):
    theirs = dtype if generation.bf16_dot else jnp.dtype(jnp.float32)
    yield from _our_attention(shape, dtype, generation)
    yield from _splash(shape, theirs)
    yield from _jax_flash(shape, theirs)


def _needed(shape, products):
    """What every implementation is measured by: the blocks of scores on and below the diagonal."""
    tiles = shape["seq"] // _TILE * (shape["seq"] // _TILE + 1) // 2 * shape["heads"]
    return {"useful_macs": tiles * products * _TILE**2 * shape["head_dim"], "unmasked_tiles": tiles}


def _our_attention(shape, dtype, generation):
    seq, heads, kv_heads, head_dim = (shape[name] for name in ("seq", "heads", "kv_heads", "head_dim"))
    aval = jax.ShapeDtypeStruct
    q, k = aval((1, seq, heads, head_dim), dtype), aval((1, seq, kv_heads, head_dim), dtype)
    segments = aval((1, seq), jnp.int32)
    sizes = default_blocks(generation, head_dim, dtype, triangle=seq).fitted(seq, seq, None)

    def attention(segmented, rate):
        def forward(q, k, v, segments):
            return kernels.flash_attention(
                q, k, v, segment_ids=segments if segmented else None, return_lse=True, implementation="pallas_tpu",
                dropout_rate=rate, dropout_key=jax.random.key(0) if rate else None,
            )  # fmt: skip

        return forward

    def case(name, kernel, fn, products, blocks, segmented):
        visits, tiles = _visits(seq, blocks, heads, segmented)
        return Case(
            f"flash_attention {name}", "pallas_tpu", "/".join(map(str, blocks)), fn, (q, k, k, segments), (kernel,),
            visits=visits, step_tiles=tiles, **_needed(shape, products),
        )  # fmt: skip

    ahead = sizes.q, sizes.kv, sizes.chunk
    back = sizes.q_backward, sizes.kv_backward, sizes.chunk_backward
    yield case("forward, no segments", "flash_attention_fwd", attention(False, 0.0), 2, ahead, False)
    for title, rate in (("", 0.0), (", dropout", 0.1)):
        fn = _with_gradient(attention(True, rate))
        yield case("forward" + title, "flash_attention_fwd", fn, 2, ahead, True)
        yield case("backward" + title, "flash_attention_bwd", fn, 5, back, True)


def _visits(seq, blocks, heads, segmented):
    """How often each form of a block runs - everything seen, some masked, a square on the diagonal - and the 128x128
    blocks of scores that the first one that runs computes."""
    q_block, kv_block, chunk = blocks
    nothing = Operands(None, None, None, None, None, None, None, (jnp.int32(0), jnp.int32(0)))
    segments = jnp.zeros((1, seq), jnp.int32)
    traced = nothing._replace(q_segment_ids=segments, kv_segment_ids=segments) if segmented else nothing
    causal = Settings(1.0, True, None, None, 0.0, 128, None)
    known, table = (schedule((seq, seq), (q_block, kv_block), it, causal, (0, seq)) for it in (nothing, traced))
    words = np.asarray(known.words)
    count = {kind: float(heads * np.sum(words & kind != 0)) for kind in (FULL, MASKED, DIAGONAL)}
    if segmented:
        count[FULL], count[MASKED] = 0.0, count[FULL] + count[MASKED]
    whole = q_block * kv_block // _TILE**2
    parts = sum(chunk * (start + chunk) for start in range(0, q_block, chunk)) // _TILE**2
    usual = next(kind for kind in table.kinds if count[kind])
    return tuple(count[kind] for kind in table.kinds), parts if usual == DIAGONAL else whole


def _splash(shape, dtype):
    """Splash attention for one device; its backward pass is the fused one, the faster of its two."""
    seq, heads, kv_heads, head_dim = (shape[name] for name in ("seq", "heads", "kv_heads", "head_dim"))
    aval = jax.ShapeDtypeStruct
    q, k = aval((heads, seq, head_dim), dtype), aval((kv_heads, seq, head_dim), dtype)
    segments = aval((seq,), jnp.int32)

    def attention(block, compute):
        sizes = jax_splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=compute, block_q_dkv=block, block_kv_dkv=block,
            block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
        )  # fmt: skip
        mask = jax_splash.MultiHeadMask([jax_splash.CausalMask((seq, seq))] * heads)

        def forward(q, k, v, segments):
            attend = jax_splash.make_splash_mha_single_device(mask, block_sizes=sizes)
            return attend(q * head_dim**-0.5, k, v, segment_ids=jax_splash.SegmentIds(segments, segments))

        return _with_gradient(forward)

    for block in (512, 1024):
        block, compute = min(block, seq), min(512, seq)
        steps = float(_blocks_seen(seq, block) * heads)
        fn = attention(block, compute)
        for name, kernel, products in (("forward", "fwd", 2), ("backward", "dkv", 5)):
            yield Case(
                f"flash_attention {name}", _label("jax splash", dtype), f"{block}/{block}/{compute}", fn,
                (q, k, k, segments), (f"splash_mha_{kernel}",), visits=(steps,),
                step_tiles=(block // _TILE) ** 2, **_needed(shape, products),
            )  # fmt: skip


def _jax_flash(shape, dtype):
    """JAX's older kernel, which has no grouped queries: keys and values as many as queries."""
    seq, heads, head_dim = (shape[name] for name in ("seq", "heads", "head_dim"))
    aval = jax.ShapeDtypeStruct
    q, segments = aval((1, heads, seq, head_dim), dtype), aval((seq,), jnp.int32)
    for block in (512, 1024):
        block = min(block, seq)

        def flash(q, k, v, segments, block=block):
            sizes = jax_flash.BlockSizes(block_q=block, block_k_major=block, block_k=block, block_b=1)
            ids = jax_flash.SegmentIds(segments[None], segments[None])
            return jax_flash.flash_attention(q, k, v, segment_ids=ids, causal=True, block_sizes=sizes)

        yield Case(
            "flash_attention forward", _label("jax flash", dtype), f"{block}/{block}", flash, (q, q, q, segments),
            visits=(float(_blocks_seen(seq, block) * heads),), step_tiles=(block // _TILE) ** 2, **_needed(shape, 2),
        )  # fmt: skip


def _gemm(shape, dtype, generation):
    """One product: XLA's own in the report's type, and ours in 8 bits, a scale a matrix or a block of 128, and with
    weights alone in 8 bits."""
    rows, k, n = (shape[name] for name in ("rows", "k", "n"))
    aval, f32 = jax.ShapeDtypeStruct, jnp.float32
    x, w, common = aval((rows, k), dtype), aval((k, n), dtype), {"useful_macs": rows * k * n}
    yield Case(
        "gemm", dtype.name, "XLA's own", lambda x, w: kernels.gemm(x, w, implementation="reference"), (x, w), **common
    )

    def ours(x, w, x_scales, w_scales):
        return kernels.scaled_matmul(x, w, x_scales, w_scales, dtype=dtype, implementation="pallas_tpu")

    k_blocks, n_blocks = -(-k // _TILE), -(-n // _TILE)
    for name, stored in (("e4m3", jnp.float8_e4m3fn), ("int8", jnp.int8)):
        w = aval((k, n), stored)
        for label, x, x_scales, w_scales in (
            (name, aval((rows, k), stored), (1, 1), (1, 1)),
            (f"{name} by 128", aval((rows, k), stored), (rows, k_blocks), (k_blocks, n_blocks)),
            (f"{name} weights", aval((rows, k), dtype), None, (1, n)),
        ):
            sizes = scaled_blocks(generation, rows, k, n, _TILE, (x.dtype.itemsize, w.dtype.itemsize, dtype.itemsize))
            steps = float(-(-rows // sizes.rows) * -(-k // sizes.k) * -(-n // sizes.n))
            avals = x, w, None if x_scales is None else aval(x_scales, f32), aval(w_scales, f32)
            blocks = f"{sizes.rows}/{sizes.k}/{sizes.n}"
            yield Case("gemm", label, blocks, ours, avals, ("gemm_scaled",), visits=(steps,), **common)


def _with_gradient(forward):
    """The gradient of the squared result, so that nothing of either pass can be left out."""

    def loss(q, k, v, segments):
        leaves = jax.tree.leaves(forward(q, k, v, segments))
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in leaves)

    return jax.grad(loss, argnums=(0, 1, 2))


def _blocks_seen(seq, block):
    return seq // block * (seq // block + 1) // 2


def _label(name, dtype):
    return name if dtype == jnp.bfloat16 else f"{name} f32"
