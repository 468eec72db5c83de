"""The TPU generations: what their cores and chips have, and the one that code is traced for."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
"""What the kernels take."""
LANES = 128
"""Columns of a register."""


@dataclass(frozen=True)
class Generation:
    """A device of a TPU generation as jax counts devices: a core of v2, v3 and 7x, a chip of the others.

    What a kernel's block sizes depend on, and what bounds a program's memory and time. Bandwidths are bytes a second;
    where a chip is two devices, each has half of what the chip has.
    """

    name: str
    device_kind: str
    mxus: int
    mxu_size: int
    """An MXU multiplies rows by a square of this size."""
    rows_per_cycle: int
    """Rows of 16-bit or 32-bit numbers that an MXU takes in a cycle, one pass each."""
    vmem: int
    """Bytes of vector memory."""
    hbm: int
    """Bytes of HBM that a program may use: what the compiler's refusals say, a little below what the chip has."""
    peak_flops: float
    """Dense bf16 FLOP/s."""
    hbm_bandwidth: float
    ici_bandwidth: float
    """Of all links to neighbouring chips together, in one direction."""
    pod: tuple[int, ...]
    """Chips of the largest slice by axis of the torus: two axes or three."""
    devices: int = 1
    """Devices of a chip."""
    cores: int = 1
    """Cores of one device, which share a kernel's parallel grid dimensions."""
    bf16_dot: bool = True
    """Whether the MXU takes bf16 operands; where it does not, they are cast to f32 first."""
    fp8: int = 0
    """How many times as fast as bf16 operands the MXU takes fp8 ones: at once, fp8 saves bytes only. 0: not at all,
    they are cast to what it takes."""
    int8: int = 0
    """The same of int8, which Mosaic casts to bf16 where the MXU lacks it and fp8 has a product: that counts as 1."""


_MIB = 2**20

_GIB = 2**30
_V5 = {"fp8": 1, "int8": 2}
_SQUARE, _V3, _V4, _V5P, _7X = (16, 16), (32, 32), (16, 16, 16), (16, 20, 28), (16, 24, 24)

# Peaks and bandwidths are those of Google's pages on each generation; of v2 and v3, the links' of doi 10.1145/3360307.
GENERATIONS = {
    it.name: it
    for it in (
        Generation(
            "v2", "TPU v2", 1, 128, 1, 16 * _MIB, int(7.48 * _GIB), 22.5e12, 350e9, 124e9, _SQUARE, 2, bf16_dot=False
        ),
        Generation(
            "v3", "TPU v3", 2, 128, 1, 16 * _MIB, int(15.48 * _GIB), 61.5e12, 450e9, 164e9, _V3, 2, bf16_dot=False
        ),
        Generation("v4", "TPU v4", 4, 128, 1, 16 * _MIB, int(30.75 * _GIB), 275e12, 1200e9, 300e9, _V4, cores=2),
        Generation(
            "v5e", "TPU v5 lite", 4, 128, 1, 128 * _MIB, int(15.75 * _GIB), 197e12, 819e9, 200e9, _SQUARE, **_V5
        ),
        Generation(
            "v5p", "TPU v5", 4, 128, 1, 64 * _MIB, int(95.74 * _GIB), 459e12, 2765e9, 600e9, _V5P, cores=2, **_V5
        ),
        Generation(
            "v6e", "TPU v6 lite", 2, 256, 2, 128 * _MIB, int(31.25 * _GIB), 918e12, 1638e9, 400e9, _SQUARE, **_V5
        ),
        Generation(
            "7x", "TPU7x", 2, 256, 2, 64 * _MIB, int(94.75 * _GIB), 1153.5e12, 3690e9, 300e9, _7X, 2, fp8=2, int8=1
        ),
    )
}


def current_generation() -> Generation | None:
    """The generation that code is traced for: that of the ambient mesh's devices, else of the default device.

    None where neither is a known TPU.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if abstract is None else abstract.device_kind
    return next((it for it in GENERATIONS.values() if it.device_kind == kind), None)
