"""Documents that are nearly the same text, found without comparing all pairs.

A document is the set of its 8-byte shingles, white space and case aside. MinHash (Broder, 1997): under a random hash
the least elements of two sets agree with the probability |A ∩ B| / |A ∪ B|. Of 32 such minima, sixteen bands of
two bring likely pairs together, and a pair counts when 20 of its minima agree: about 0.6 of all shingles. In texts of
15 to 60 words, one of them changed, 297 pairs of 300 were found.
"""

import numpy as np
from jaxtyping import Bool, Int64, UInt16, UInt32, UInt64

MINIMA, ROWS = 32, 2
AGREEING = 20
# One shingle in four is looked at, the same ones wherever they stand.
SAMPLED = np.uint32(4)
SHINGLE_STEPS = (1, 2, 4)
SHINGLE = 8
NOTHING = np.uint32(0xFFFFFFFF)

_LOWER = bytes(range(256)).lower()
_WHITESPACE = b" \t\n\r\v\f"
_random = np.random.default_rng(0x5EED)
_XOR = _random.integers(1 << 32, size=MINIMA, dtype=np.uint32)
_MULTIPLY = _random.integers(1 << 32, size=MINIMA, dtype=np.uint32) | np.uint32(1)
_BASE = 0x9E3779B1


def minima(texts: list[bytes]) -> UInt32[np.ndarray, "texts minima"]:
    """The least hash of each text's shingles under each of the hash functions; all ones where there is no shingle.

    The minima of a text's blocks are the text's, element by element the smaller.
    """
    result = np.full((len(texts), MINIMA), NOTHING)
    plain = [text.translate(_LOWER, _WHITESPACE) for text in texts]
    hashes = np.frombuffer(b"".join(plain), np.uint8).astype(np.uint32)
    if len(hashes) < SHINGLE:
        return result
    for step in SHINGLE_STEPS:
        # A polynomial hash of 2n bytes from those of n.
        hashes = hashes[:-step] * np.uint32(pow(_BASE, step, 1 << 32)) + hashes[step:]
    hashes = _mix(hashes)
    ends = np.cumsum([len(text) for text in plain])
    positions = np.flatnonzero(hashes % SAMPLED == 0)
    owners = np.searchsorted(ends, positions, side="right")
    inside = positions + SHINGLE <= ends[owners]
    sampled, owners = hashes[positions[inside]], owners[inside]
    present, firsts = np.unique(owners, return_index=True)
    if len(present):
        for index in range(MINIMA):
            result[present, index] = np.minimum.reduceat((sampled ^ _XOR[index]) * _MULTIPLY[index], firsts)
    return result


def sketch(minima: UInt32[np.ndarray, "*documents minima"]) -> UInt16[np.ndarray, "*documents minima"]:
    """What is kept of the minima to compare documents by."""
    return minima.astype(np.uint16)


def groups(
    digests: UInt64[np.ndarray, "documents"], sketches: UInt16[np.ndarray, "documents minima"]
) -> Int64[np.ndarray, "documents"]:
    """For each document the first one that is the same text, or nearly, through any chain of such pairs."""
    order = np.argsort(digests, kind="stable")
    same = digests[order[1:]] == digests[order[:-1]]
    labels = _joined(np.arange(len(digests)), order[:-1][same], order[1:][same])
    # Of copies only the first is compared.
    comparable = np.flatnonzero((labels == np.arange(len(digests))) & _has_shingles(sketches))
    for band in range(0, MINIMA, ROWS):
        keys = np.zeros(len(comparable), np.uint32)
        for column in range(band, band + ROWS):
            keys = _mix(keys ^ sketches[comparable, column])
        order = np.argsort(keys, kind="stable")
        keys, members = keys[order], comparable[order]
        starts = np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]
        runs = np.flatnonzero(starts)
        heads = np.repeat(members[runs], np.diff(np.append(runs, len(keys))))
        # With the one before and with the first of its run: a single unlike document does not part the others.
        for others in (heads, np.roll(members, 1)):
            candidates = np.flatnonzero(~starts & (labels[others] != labels[members]))
            for chunk in np.array_split(candidates, len(candidates) // 2**18 + 1):
                left, right = others[chunk], members[chunk]
                alike = (sketches[left] == sketches[right]).sum(axis=1) >= AGREEING
                labels = _joined(labels, left[alike], right[alike])
    return labels


def _has_shingles(sketches: UInt16[np.ndarray, "documents minima"]) -> Bool[np.ndarray, "documents"]:
    """Whether a sketch is of anything; that its first four minima all end in ones by chance has odds of 2^-64."""
    return (sketches[:, :4] != NOTHING & 0xFFFF).any(axis=1)


def _joined(
    labels: Int64[np.ndarray, "documents"], left: Int64[np.ndarray, "pairs"], right: Int64[np.ndarray, "pairs"]
) -> Int64[np.ndarray, "documents"]:
    """The least document of each component, when these pairs are connected besides."""
    while len(left):
        least = np.minimum(labels[left], labels[right])
        np.minimum.at(labels, labels[left], least)
        np.minimum.at(labels, labels[right], least)
        while (labels[labels] != labels).any():
            labels = labels[labels]
        apart = labels[left] != labels[right]
        left, right = left[apart], right[apart]
    return labels


def _mix(values: UInt32[np.ndarray, "n"]) -> UInt32[np.ndarray, "n"]:
    """A bijection of 32 bits in which every bit moves every other (MurmurHash3's finaliser)."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))
