"""The TPU generations, and the one that code is traced for."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
"""What the kernels take."""
LANES = 128
"""Columns of a register."""


@dataclass(frozen=True)
class Generation:
    """What a kernel's block sizes depend on: one core of a TPU generation."""

    name: str
    device_kind: str
    mxus: int
    mxu_size: int
    """An MXU multiplies rows by a square of this size."""
    rows_per_cycle: int
    """Rows of 16-bit or 32-bit numbers that an MXU takes in a cycle, one pass each."""
    vmem: int
    """Bytes of vector memory."""
    cores: int = 1
    """Cores of one device, which share a kernel's parallel grid dimensions."""
    bf16_dot: bool = True
    """Whether the MXU takes bf16 operands; where it does not, they are cast to f32 first."""


_MIB = 2**20

GENERATIONS = {
    it.name: it
    for it in (
        Generation("v2", "TPU v2", 1, 128, 1, 16 * _MIB, bf16_dot=False),
        Generation("v3", "TPU v3", 2, 128, 1, 16 * _MIB, bf16_dot=False),
        Generation("v4", "TPU v4", 4, 128, 1, 16 * _MIB, cores=2),
        Generation("v5e", "TPU v5 lite", 4, 128, 1, 128 * _MIB),
        Generation("v5p", "TPU v5", 4, 128, 1, 64 * _MIB, cores=2),
        Generation("v6e", "TPU v6 lite", 2, 256, 2, 128 * _MIB),
        Generation("7x", "TPU7x", 2, 256, 2, 64 * _MIB),
    )
}


def current_generation() -> Generation | None:
    """The generation that code is traced for: that of the ambient mesh's devices, else of the default device.

    None where neither is a known TPU.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if abstract is None else abstract.device_kind
    return next((it for it in GENERATIONS.values() if it.device_kind == kind), None)
