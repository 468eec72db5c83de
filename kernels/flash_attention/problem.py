"""What an attention call asks for, after validation: the one thing that every implementation takes."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Int, UInt32


@dataclass(frozen=True)
class Settings:
    """The numbers that are known when tracing."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    dropout_rate: float
    block_size: int
    """Queries and keys of a block of the block mask."""
    block_mask: tuple[tuple[bool, ...], ...] | None
    """A block mask that is known when tracing, so that empty blocks are left out of the program."""


class Operands(NamedTuple):
    """The arrays that decide who sees whom; none has a gradient."""

    q_segment_ids: Int[Array, "batch q_len"] | None
    kv_segment_ids: Int[Array, "batch kv_len"] | None
    mask: Bool[Array, "#batch #heads #q_len #kv_len"] | None
    block_mask: Bool[Array, "q_blocks kv_blocks"] | None
    q_offset: Int[Array, " batch"] | None
    kv_lengths: Int[Array, " batch"] | None
    dropout_key: UInt32[Array, " words"] | None
    dropout_offset: tuple[jax.Array, jax.Array]
    """The global batch row and head that this call's first ones are."""
