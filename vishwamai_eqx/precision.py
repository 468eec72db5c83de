"""What is computed in which type.

    parameters, optimiser state, gradients' sums          f32
    norms, softmax, router, rotary angles, loss           f32
    matrix products and the activations between them      the compute type, with sums in f32
    products with the blocks' weights, in fp8             e4m3 forward, e5m2 gradients, with sums in f32

The compute type is `--precision`: f32, bf16 or f16, and bf16 of fp8. Embedding, head and router stay in theirs; what
is multiplied in fp8 has a scale for every 128 numbers of activations and gradients and every 128 by 128 of weights,
taken from the numbers at hand (`kernels.fp8_gemm`), or one for each tensor (`scaling`), and weights are gathered in fp8
(`mesh.gather`). In f16, which ends at 65504 and at 2^-24, gradients are those of the loss times a factor (`scaling`).
"""

from pathlib import Path

import jax

COMPUTE_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "fp8": "bfloat16"}


def compute_dtype(precision: str) -> str:
    """The type of `precision`; auto is bf16 on accelerators and on CPUs that multiply bf16, and f32 on other CPUs."""
    if precision == "auto":
        precision = "bf16" if jax.default_backend() != "cpu" or cpu_multiplies_bf16() else "f32"
    return COMPUTE_DTYPES[precision]


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has AMX's bf16 tiles; with less, f32 products are as fast and casts only cost."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()
