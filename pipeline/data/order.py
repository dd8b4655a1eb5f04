"""The global order as a pure function of (seed, epoch), with random access.

Nothing is materialised or replayed: the element at position p is computed from p, so
resuming after ten million samples costs what the first batch costs.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

ROUNDS = 8  # Luby and Rackoff need 4; small domains mix less in each


def mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea & Flood 2014): uint64 to uint64, a bijection."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def stream_key(*words: "int | np.ndarray") -> np.ndarray:
    """uint64 (n,) from integers and arrays (n,); differs wherever one of them does."""
    key = np.zeros(1, np.uint64)
    for word in words:
        if isinstance(word, int):
            word = np.array([word & 0xFFFFFFFFFFFFFFFF], np.uint64)
        key = mix(key + word.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return key


def permute(positions: np.ndarray, n: "int | np.ndarray", key: np.ndarray) -> np.ndarray:
    """Elements (int64) at `positions` of the pseudorandom permutation of range(n) under `key`.

    A generalised Feistel network on Z_a x Z_b with a * b just above n, and cycle walking
    for the few values past n (Black & Rogaway, "Ciphers with Arbitrary Finite Domains",
    CT-RSA 2002, sections 3 and 4). `positions` is (m,); `n` and `key` are one or (m,) too.
    """
    n_ = np.broadcast_to(np.asarray(n, np.uint64), positions.shape)
    key = np.broadcast_to(key, positions.shape)
    a = np.ceil(np.sqrt(n_.astype(np.float64))).astype(np.uint64)
    b = (n_ + a - np.uint64(1)) // a
    values = _feistel(positions.astype(np.uint64), a, b, key)
    outside = np.flatnonzero(values >= n_)
    while outside.size:
        walked = _feistel(values[outside], a[outside], b[outside], key[outside])
        values[outside] = walked
        outside = outside[walked >= n_[outside]]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    left, right = values // b, values % b  # in Z_a, Z_b
    for round_ in range(1, ROUNDS + 1):
        round_key = mix(key + np.uint64(round_))
        if round_ % 2:
            left = np.remainder(left + mix(right + round_key) % a, a)
        else:
            right = np.remainder(right + mix(left + round_key) % b, b)
    return left * b + right


class Permutation:
    """The pseudorandom permutation of range(n) that belongs to integers (seed, epoch, ...)."""

    def __init__(self, n: int, *words: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} elements")
        self.n = n
        self._key = stream_key(*words)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Elements (int64) at `positions` (integers in [0, n), any shape)."""
        positions = np.asarray(positions)
        return permute(positions.reshape(-1), self.n, self._key).reshape(positions.shape)


class Interleave:
    """Which of K sets the row at position p comes from, and how many it gave before.

    Set 0 takes its share of all positions by Bresenham's rule, set 1 its share of the rest,
    and so on. Weights are fractions over a common denominator D, and the pattern repeats
    after D positions, so any m * D rows in a row hold each set exactly m * D * weight times:
    weights with three decimals are exact over any 1,000 batches of any size. Where D does
    not divide the number of rows, a count is off by fewer rows than there are sets.
    """

    MAX_DENOMINATOR = 1_000_000  # keeps position * share inside int64 up to 9e12 rows

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        """Weights of any positive sum; taken as written: 0.1 is one tenth."""
        if not weights or any(not weight > 0 for weight in weights):
            raise ValueError(f"mixture weights must be positive: {list(weights)}")
        exact = [
            w if isinstance(w, Fraction) else Fraction(str(w)).limit_denominator(10**6)
            for w in weights
        ]
        total = sum(exact, Fraction(0))
        self.shares = shares = [weight / total for weight in exact]
        denominator = 1
        for share in shares:
            denominator = np.lcm(denominator, share.denominator, dtype=object)
        if denominator > self.MAX_DENOMINATOR:
            denominator = self.MAX_DENOMINATOR
        # largest remainders; exact where the denominator divides
        counts = [int(share * denominator) for share in shares]
        by_remainder = sorted(
            range(len(shares)), key=lambda k: (counts[k] - shares[k] * denominator, k)
        )
        for k in by_remainder[: int(denominator) - sum(counts)]:
            counts[k] += 1
        if min(counts) == 0:
            raise ValueError(f"a mixture weight is below a millionth of the sum: {list(weights)}")
        self.counts = counts
        self.denominator = int(denominator)

    @property
    def weights(self) -> list[Fraction]:
        """The weights as they are kept."""
        return [Fraction(count, self.denominator) for count in self.counts]

    def before(self, position: int) -> list[int]:
        """Rows that each set gave in positions [0, position)."""
        given, rest, remaining = [], position, self.denominator
        for count in self.counts[:-1]:
            taken = rest * count // remaining
            given.append(taken)
            rest -= taken
            remaining -= count
        return [*given, rest]

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(set, number of the draw in its set) of each position in [start, stop); int64."""
        positions = np.arange(start, stop, dtype=np.int64)
        sets = np.full(stop - start, len(self.counts) - 1, np.int64)
        numbers = np.zeros(stop - start, np.int64)
        undecided = np.arange(stop - start)
        remaining = self.denominator
        for k, count in enumerate(self.counts[:-1]):
            here = positions[undecided]
            before = here * count // remaining
            taken = (here + 1) * count // remaining > before
            sets[undecided[taken]] = k
            numbers[undecided[taken]] = before[taken]
            undecided = undecided[~taken]
            positions[undecided] = (here - before)[~taken]
            remaining -= count
        numbers[undecided] = positions[undecided]
        return sets, numbers
