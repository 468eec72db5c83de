"""The 8-bit formats: how far they reach and how finely they round.

| format | largest | rounds by at most | below, in steps of |
|---|---|---|---|
| e4m3 | 448 | 1/16 of a number | 2^-9 |
| e5m2 | 57344 | 1/8 of a number | 2^-16 |
| int8 | 127 | | 1 |

FP8 Formats for Deep Learning, arXiv 2209.05433: e4m3 has the digits, for what is multiplied in the forward pass; e5m2
has the reach, for gradients.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

E4M3, E5M2, INT8 = (jnp.dtype(dtype) for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8))


@dataclass(frozen=True)
class Format:
    """A number in [-largest, largest] becomes one at most max(relative |number|, step / 2) away."""

    dtype: jnp.dtype
    largest: float
    """Symmetric: of int8, -128 stays unused, so that a number and its negative have the same error."""
    overflow: float
    """Half a step beyond the largest: what is smaller rounds to the largest, the rest is cut down to it."""
    relative: float
    """Half of the distance between neighbours, over the numbers: zero for int8, whose neighbours are a step apart."""
    step: float
    """The distance between the numbers nearest to zero."""
    power_of_two: bool
    """Whether its scales are powers of two. A float's digits then stay as they are, whatever it is scaled by and
    however often: what is quantised again along another axis is not rounded again, and scaled values are exact in bf16.
    It costs one of the 18 or 32 octaves of a float, at the small end; of int8 it would cost a digit."""


def _float(dtype):
    it = jnp.finfo(dtype)
    largest, relative = float(it.max), 2.0 ** -(it.nmant + 1)
    octave = 2.0 ** (math.frexp(largest)[1] - 1)
    return Format(dtype, largest, largest + relative * octave, relative, float(it.smallest_subnormal), True)


FORMATS = {E4M3: _float(E4M3), E5M2: _float(E5M2), INT8: Format(INT8, 127.0, 127.5, 0.0, 1.0, False)}


def format_of(dtype: DTypeLike) -> Format:
    """The format of a type.

    **Raises** ValueError for any other type.
    """
    found = FORMATS.get(jnp.dtype(dtype))
    if found is None:
        names = ", ".join(it.name for it in FORMATS)
        raise ValueError(f"quantize: dtype={jnp.dtype(dtype).name} must be one of {names}; take float8_e4m3fn")
    return found
