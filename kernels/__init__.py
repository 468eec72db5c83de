"""Array kernels: flash attention, matrix products, expert dispatch. Arrays in, arrays out.

Every operation has one signature and several implementations, named by `implementation=`: `reference` is obvious and
computes in f32, `xla` is pure JAX arranged to be fast, `pallas_tpu` are kernels for every TPU generation. `None` takes
what is fastest on the backend and logs it once. `python -m kernels.report` compiles them all, without a TPU.
Whatever the implementation, products accumulate in f32 (f64 for f64 inputs) and results have the inputs' type.

Under `jax.shard_map(..., check_vma=True)` inputs may vary over different mesh axes: each operation makes its inputs
vary over the union first, so that the gradient of a replicated input is summed over the others' axes, as in plain JAX.

Glossary of axes. Inside `shard_map` a name is the local size.

- `batch`, `q_len`, `kv_len`, `heads`, `kv_heads`, `head_dim`: attention; each kv head serves heads / kv_heads heads
- `rows`, `k`, `n`: a matrix product contracts k
- `tokens`, `d_model`, `choices`: what a router sees; each token goes to `choices` experts
- `groups`, `experts`: weights of a grouped product; `padded_rows`: rows sorted by expert with the gaps of alignment
"""

from kernels.flash_attention.api import flash_attention
from kernels.gemm.api import gemm, scaled_matmul
from kernels.gemm.fp8 import Fp8, fp8_activations, fp8_gemm, fp8_weights
from kernels.gemm.meters import Meter, Meters
from kernels.gemm.quantize import Quantized, dequantize, quantize
from kernels.grouped_matmul.api import grouped_matmul
from kernels.grouped_matmul.fp8 import fp8_grouped_matmul
from kernels.moe_dispatch.api import DispatchPlan, moe_combine, moe_dispatch

__all__ = [
    "DispatchPlan",
    "Fp8",
    "Meter",
    "Meters",
    "Quantized",
    "dequantize",
    "flash_attention",
    "fp8_activations",
    "fp8_gemm",
    "fp8_grouped_matmul",
    "fp8_weights",
    "gemm",
    "grouped_matmul",
    "moe_combine",
    "moe_dispatch",
    "quantize",
    "scaled_matmul",
]
