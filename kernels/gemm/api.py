"""The public `gemm`."""

import jax
from jaxtyping import Array, Float

from kernels.choice import choose
from kernels.gemm import reference, xla
from kernels.tpu import current_generation

_IMPLEMENTATIONS = {"reference": reference.gemm, "xla": xla.gemm}


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
    if w.ndim != 2 or w.shape[1 if transposed else 0] != x.shape[-1]:
        expected = f"[n, {x.shape[-1]}]" if transposed else f"[{x.shape[-1]}, n]"
        raise ValueError(
            f"gemm: w has shape {list(w.shape)}, expected {expected} for x {list(x.shape)} with "
            f"transposed={transposed}; pass transposed={not transposed} if w is stored the other way round"
        )
    # What is traced for a TPU on a machine with none is what a TPU has.
    on_cpu = current_generation() is None and jax.default_backend() == "cpu"
    name = choose("gemm", implementation, _IMPLEMENTATIONS, "xla" if on_cpu else "reference")
    return _IMPLEMENTATIONS[name](x, w, transposed)
