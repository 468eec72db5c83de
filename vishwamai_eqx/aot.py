"""The training step compiled for TPUs that are not there, and what the compiler says of it.

`compile_step` takes the jitted step and its abstract arguments, never a script; `kernels.topology` has the devices.
"""

import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kernels.moe_dispatch.plan import default_alignment, padded_rows
from vishwamai_eqx import flops, program
from vishwamai_eqx.config import Config
from vishwamai_eqx.program import Kernel, Program, Shape

# How the compiler writes sizes.
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step on one device."""

    peak: int
    """Bytes of HBM: arguments, results that take no argument's place, and temporaries."""
    program: Program | None
    """What it does; None where it is too big to be made."""
    seconds: float
    """That compiling took."""

    @property
    def fits(self) -> bool:
        return self.program is not None


def compile_step(step: jax.stages.Wrapped, arguments: tuple[Any, ...], on: Mesh, config: Config) -> Compiled:
    """Compile a training step of the configuration for the devices of a mesh.

    **Raises** what the compiler raises, but for a program that is too big.
    """
    started = time.perf_counter()
    # Kernels ask the ambient mesh which TPU they are traced for.
    with jax.sharding.use_abstract_mesh(on.abstract_mesh):
        lowered = step.trace(*arguments).lower(lowering_platforms=("tpu",))
    try:
        # With the cache of compiled programs jax would write programs there that it cannot read.
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = exhausted(str(error))
        if needed is None:
            raise
        return Compiled(needed, None, time.perf_counter() - started)
    memory = compiled.memory_analysis()
    assert memory is not None
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    rows = config.optim.batch_size // config.optim.microbatches // _shards(on)
    read = program.read(compiled.as_text() or "", on.size, counter(config, rows * config.model.max_seq_len))
    return Compiled(peak + memory.temp_size_in_bytes, read, time.perf_counter() - started)


def exhausted(message: str) -> int | None:
    """The bytes of HBM that a program needs which the compiler refused for them; None for another refusal."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    # Scalar and vector memory run out in the same words; of them no smaller batch makes more.
    for pattern in (r"space hbm\. Used ([\d.]+)([KMGT]?)", r"required for HLO temporaries \(([\d.]+)([KMGT]?)"):
        if found := re.search(pattern, message):
            return round(float(found[1]) * _UNITS[found[2]])
    return None


def counter(config: Config, tokens: int) -> Kernel:
    """What a kernel of this package multiplies for a step's microbatch of so many tokens on a device.

    Of a routed buffer the rows that tokens take; of scores those that a query sees. The backward kernel of attention
    makes the scores again.
    """
    model = config.model
    choices = tokens * model.experts_per_token
    padded = padded_rows(choices, model.num_experts, default_alignment(choices, model.num_experts))
    seen = flops.keys_seen(config)

    def count(name: str, operands: list[Shape], results: list[Shape]) -> tuple[float, float]:
        out = results[0].sizes
        if name == "grouped_matmul_drhs":
            # Of each expert's gradient, rows x k x n.
            rows, groups = operands[-1].sizes[0], out[0]
            return 2.0 * np.prod(out) / groups * (choices if rows == padded else rows), 0.0
        if name.startswith("grouped_matmul"):
            rows, k = operands[-2].sizes
            return 2.0 * (choices if rows == padded else rows) * k * out[1], 0.0
        if name.startswith("flash_attention_fwd"):
            return 4.0 * float(np.prod(out)) * seen, 0.0
        if name.startswith("flash_attention_bwd"):
            # One call has all keys, or a part of them.
            product = 2.0 * float(np.prod(out)) * seen * results[1].sizes[2] / model.max_seq_len
            return 5 * product, product
        if name == "gemm_scaled":
            # With what its blocks are padded by: the sizes before that are not in the program.
            return 2.0 * float(np.prod(out)) * operands[0].sizes[1], 0.0
        return 0.0, 0.0

    return count


def _shards(on: Mesh) -> int:
    """Devices that divide the batch."""
    return int(np.prod([size for axis, size in on.shape.items() if axis != "model"]))
