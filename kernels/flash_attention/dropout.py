"""Which attention probabilities dropout keeps: a function of where an element is, not of who computes it.

A counter-based hash in 32-bit integer operations that every backend has. Batch row, head and query are mixed with the
key once a row and the kv index once a column; an element then costs one multiplication, whose high bits decide. The
row's second word is the multiplier (multiply-shift hashing, Dietzfelbinger et al. 1997), so that no two rows share
their pattern, shifted or with its columns permuted.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

_GOLDEN = 0x9E3779B9


def keep(
    key: UInt32[Array, " words"],
    rate: float,
    batch: Int[Array, "*#shape"],
    head: Int[Array, "*#shape"],
    query: Int[Array, "*#shape"],
    kv: Int[Array, "*#shape"],
) -> Bool[Array, "..."]:
    """Whether each element is kept, with probability 1 - rate; indices are global and broadcast.

    Keep batch, head and query of size 1 along the kv axis, and kv of size 1 along theirs: that is what makes it cheap.
    """
    return combine(rate, *row_words(key, batch, head, query), column_word(kv))


def row_words(
    key: UInt32[Array, " words"],
    batch: Int[Array, "*#shape"],
    head: Int[Array, "*#shape"],
    query: Int[Array, "*#shape"],
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """The two words of a row of scores: one for its columns to meet, and an odd one to multiply with."""
    row = jnp.uint32(_GOLDEN)
    for part in (*(key[i] for i in range(key.shape[0])), batch, head, query):
        row = _mix(row * jnp.uint32(5) + jnp.asarray(part).astype(jnp.uint32))
    return row, _mix(row ^ jnp.uint32(_GOLDEN)) | jnp.uint32(1)


def column_word(kv: Int[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The word of a column of scores."""
    return _mix(kv.astype(jnp.uint32) + jnp.uint32(_GOLDEN))


def combine(
    rate: float, row: UInt32[Array, "*#shape"], second: UInt32[Array, "*#shape"], column: UInt32[Array, "*#shape"]
) -> Bool[Array, "..."]:
    """Whether the element of a row and a column is kept."""
    # As good a comparison with signs, which vector units have, as without.
    return ((row ^ column) * second).astype(jnp.int32) >= min(round(rate * 2**32), 2**32 - 1) - 2**31


def _mix(x):
    """A bijection of 32 bits in which every input bit moves every output bit (lowbias32, Wellons 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
