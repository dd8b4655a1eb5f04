"""Uniform numbers that depend on (seed of the sample, position, lane) and on nothing else.

A generator with a state makes a sample depend on what was drawn before it. Here each
number is computed from its coordinates (a counter-based generator), so sample 17 meets the
same randomness in a batch of 1 or of 64, on any rank, and after any interruption.

Philox4x32-10: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011), section 4.2 and table 2.
"""

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

LANE_TOKEN = 0
"""The draw of the element at a position."""
LANE_ACCEPT = 1
"""Whether a drafted element at a position is accepted (speculative decoding)."""
LANE_DRAFT = 2
"""The draft model's own draw at a position."""
LANE_COMPONENT = 3
"""Which component of a mixture is drawn from."""


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Ten rounds of Philox on `counter` (..., 4) under `key` (..., 2), 32-bit words as uint64."""
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    k0, k1 = np.moveaxis(key.astype(np.uint64), -1, 0)
    for _ in range(10):
        product0 = _MULTIPLIERS[0] * c0
        product1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1)


def uniforms(seeds: np.ndarray, positions: np.ndarray, lane: int = LANE_TOKEN) -> np.ndarray:
    """Float64 numbers in the open interval (0, 1), 53 bits each.

    `seeds` (any 64-bit integers) and `positions` broadcast against each other.
    """
    seeds, positions = np.broadcast_arrays(
        np.asarray(seeds).astype(np.uint64), np.asarray(positions).astype(np.uint64)
    )
    counter = np.stack(
        [
            positions & _LOW,
            positions >> _SHIFT,
            np.full_like(positions, lane),
            np.zeros_like(positions),
        ],
        axis=-1,
    )
    key = np.stack([seeds & _LOW, seeds >> _SHIFT], axis=-1)
    words = philox(counter, key)
    # 53 bits, centred in their cell, so that neither 0 nor 1 ever comes out.
    bits = ((words[..., 0] << _SHIFT) | words[..., 1]) >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) * 2.0**-53


def sample_seeds(seed: int, indices: np.ndarray) -> np.ndarray:
    """The seed of each sample of a run: a 63-bit hash of (run seed, index), as int64.

    Hashed rather than added, so that two runs with seeds 0 and 1 share no sample.
    """
    indices = np.asarray(indices).astype(np.uint64)
    counter = np.zeros((*indices.shape, 4), dtype=np.uint64)
    counter[..., 0] = indices & _LOW
    counter[..., 1] = indices >> _SHIFT
    counter[..., 2] = 0x5EED  # a lane of its own: never the counter of a draw
    key = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], dtype=np.uint64)
    words = philox(counter, np.broadcast_to(key, (*indices.shape, 2)))
    return (((words[..., 0] << _SHIFT) | words[..., 1]) >> np.uint64(1)).astype(np.int64)
