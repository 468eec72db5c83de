"""The public `gemm` and `scaled_matmul`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from kernels.choice import choose, choose_kernel, warn_once
from kernels.gemm import pallas_tpu, reference, xla
from kernels.gemm.formats import FORMATS, INT8
from kernels.gemm.scales import Scaling, block_of
from kernels.tpu import DTYPES, current_generation

_IMPLEMENTATIONS = {"reference": reference.gemm, "xla": xla.gemm}
_SCALED = {
    "reference": reference.scaled_matmul,
    "xla": xla.scaled_matmul,
    "pallas_tpu": pallas_tpu.scaled_matmul,
}


def gemm(
    x: Float[Array, "*batch k"],
    w: Float[Array, "..."],
    *,
    transposed: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    """The product of activations and a weight, accumulated in f32, in the type of the activations.

    y = x w with w [k, n], or y = x wᵀ with w [n, k] if `transposed`.

    w is rounded to x's type first; its gradient has w's own type, unrounded if that is f32. On CPU keep activations
    [batch, seq, k] and store a weight with its smaller side first: `transposed` if n < k.

    **Raises** ValueError where w is not a matrix of x's k, or the implementation is unknown.
    """
    check_shapes("gemm", x.shape, w.shape, transposed)
    # What is traced for a TPU on a machine with none is what a TPU has.
    on_cpu = current_generation() is None and jax.default_backend() == "cpu"
    name = choose("gemm", implementation, _IMPLEMENTATIONS, "xla" if on_cpu else "reference")
    return _IMPLEMENTATIONS[name](x, w, transposed)


def scaled_matmul(
    x: Shaped[Array, "rows k"],
    w: Shaped[Array, "..."],
    x_scales: Float[Array, "..."] | None,
    w_scales: Float[Array, "..."],
    *,
    block_size: int = 128,
    transposed: bool = False,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
    interpret: Any = None,
) -> Float[Array, "rows n"]:
    """The product of what was quantised, accumulated in f32, in `dtype`.

    y = X W with X = x x_scales and W = w w_scales, or y = X Wᵀ with w [n, k] if `transposed`. With x_scales=None x is
    bf16 or f32 and not scaled: a product with weights that are only stored in 8 bits.

    x and w are both fp8, e4m3 or e5m2, or both int8, as `quantize` makes them; scales are f32 and along each axis one
    for all, one for each `block_size` numbers, or, along rows and n, one for each. The scales of fp8 are powers of two:
    where operands are scaled before they are multiplied, 8 bits are kept of others. Scales that are not finite make
    what they scale NaN.

    No gradient goes through numbers of 8 bits: `fp8_gemm` has one.

    **Raises** ValueError where shapes, types or scales do not fit, and where the implementation is unknown or has no
    kernel for the type or the block size.
    """
    check_shapes("scaled_matmul", x.shape, w.shape, transposed)
    _check_types(x, w, x_scales)
    k_of_w = 1 if transposed else 0
    scaling = Scaling(
        *(x.shape[0], x.shape[1], w.shape[1 - k_of_w], block_size, transposed, jnp.dtype(dtype)),
        x_block=x.shape if x_scales is None else block_of("x_scales", x_scales, x.shape, 1, block_size),
        w_block=block_of("w_scales", w_scales, w.shape, k_of_w, block_size),
    )
    dtypes = (*FORMATS, *DTYPES)
    product = choose_kernel("scaled_matmul", implementation, _SCALED, "x", x.dtype, interpret, dtypes)
    if x_scales is not None and implementation is None:
        _say_what_falls_back(x.dtype, scaling)
    with jax.named_scope("scaled_matmul"):
        return product(x, w, x_scales, w_scales, scaling)


def check_shapes(operation: str, x: tuple[int, ...], w: tuple[int, ...], transposed: bool) -> None:
    """**Raises** ValueError where w's shape is not that of a matrix of x's k."""
    if len(w) != 2 or w[1 if transposed else 0] != x[-1]:
        expected = f"[n, {x[-1]}]" if transposed else f"[{x[-1]}, n]"
        raise ValueError(
            f"{operation}: w has shape {list(w)}, expected {expected} for x {list(x)} with "
            f"transposed={transposed}; pass transposed={not transposed} if w is stored the other way round"
        )


def _say_what_falls_back(dtype, scaling):
    """One sentence where what is multiplied has not the 8 bits that it is held in."""
    generation, kind = current_generation(), "int8" if dtype == INT8 else "fp8"
    if generation is not None:
        where, lacks = f"TPU {generation.name}", not (generation.int8 if dtype == INT8 else generation.fp8)
    elif jax.default_backend() == "cpu":
        where, lacks = "XLA on cpu", True
    else:
        # What has one scale along k is left to XLA, which may have an instruction for it.
        where, lacks = f"XLA on {jax.default_backend()}, with scales of blocks,", scaling.depth < scaling.k
    if lacks:
        warn_once(
            f"scaled_matmul: {where} has no product of {kind}: numbers are held in 8 bits and widened to be "
            "multiplied, which saves bytes and no time"
        )


def _check_types(x, w, x_scales):
    if x_scales is None:
        possible, fix = set(DTYPES), "pass x_scales for an x that was quantised"
    else:
        possible = {INT8} if w.dtype == INT8 else set(FORMATS) - {INT8}
        fix = "quantise both alike, or pass x_scales=None with an x of bfloat16"
    names = ", ".join(sorted(it.name for it in (possible if w.dtype in FORMATS else FORMATS)))
    if w.dtype not in FORMATS:
        raise ValueError(f"scaled_matmul: w.dtype={w.dtype} must be one of {names}; quantise w first")
    if x.dtype not in possible:
        raise ValueError(f"scaled_matmul: x.dtype={x.dtype} must be one of {names} for w {w.dtype}; {fix}")
