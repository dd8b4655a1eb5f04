"""Integer frequency tables and the entropy coder that uses them.

A probability mass function is quantised to integer frequencies first, and only the
integers reach the coder: two tables that differ in the last float bit mostly quantise to
the same integers, and where they do not, the container's checks notice. The coder itself is
`constriction`'s range coder (Bamler, "Understanding Entropy Coding With Asymmetric Numeral
Systems", arXiv:2201.01741; Martin, "Range encoding", 1979), whose tables have 24 bits.

A vocabulary above `ONE_LEVEL` is coded in two steps, a bucket and then the symbol within
its bucket. Each step has a table of about sqrt(V) entries: 24 bits are then plenty
(a single table of 32,000 wastes 0.2 % of its mass on the entries that must not be zero)
and a step touches hundreds of entries, not tens of thousands.

Shapes: N symbols coded at one step, V symbols of the alphabet.
"""

import constriction
import numpy as np
import numpy.typing as npt

ONE_LEVEL = 512
"""Largest alphabet coded with a single table."""
PRECISION = 30
"""Bits of the integer frequencies; the sum of a row stays below 2**31, exact in a float64."""
LARGEST_ALPHABET = 1 << 18
"""Entries that must not be zero take V / 2**30 of a table: 0.0004 bits a symbol at this size."""
_FAMILY = constriction.stream.model.Categorical(perfect=False)
_UNIFORM = constriction.stream.model.Uniform()

Integers = npt.NDArray[np.int64]


class CodingError(ValueError):
    """A distribution that cannot be coded, or symbols outside their alphabet."""


class UncodableError(CodingError):
    """The same, of some rows (or items, or streams) alone: `places` says of which."""

    def __init__(self, message: str, places: list[int]) -> None:
        super().__init__(message)
        self.places = places


def quantise(pmf: npt.NDArray[np.floating]) -> Integers:
    """Frequencies (N, V) of probabilities (N, V): every entry at least 1, rows near 2**30.

    UncodableError on NaN, negative or non-normalised rows: a wrong table must never be coded
    with, since the file could not be read back on another day. CodingError on more than
    `LARGEST_ALPHABET` symbols.
    """
    table = np.asarray(pmf, dtype=np.float64)
    if table.ndim != 2 or not 1 <= table.shape[1] <= LARGEST_ALPHABET:
        raise CodingError(f"a table of shape {table.shape}; (N, V) with V <= {LARGEST_ALPHABET}")
    total = table.sum(axis=1, keepdims=True)
    # the two comparisons are False for NaN as well
    fine = (table >= 0).all(axis=1) & (np.abs(total - 1) < 1e-2)[:, 0]
    if not fine.all():
        raise UncodableError(
            "the model's probabilities are not a distribution "
            f"(sums between {total.min():.6g} and {total.max():.6g})",
            np.flatnonzero(~fine).tolist(),
        )
    size = table.shape[1]
    return np.floor(table * ((1 << PRECISION) - size)).astype(np.int64) + 1


def least_bits(size: int) -> float:
    """What a symbol of this alphabet costs at least: its tables leave 2**-24 to each other entry.

    So a stream of n bytes cannot hold more than 8 n / least_bits(V) symbols (and a few, which
    its last byte still separates): a container that claims more is damaged or hostile.
    """
    bits = bucket_bits(size)
    others = size - 1 if bits == 0 else -(-size // (1 << bits)) - 1 + (1 << bits) - 1
    return max(others, 1) * 2.0**-24


def bucket_bits(size: int) -> int:
    """log2 of the bucket width for an alphabet of `size` symbols; 0: a single table."""
    return 0 if size <= ONE_LEVEL else (int(size - 1).bit_length() + 1) // 2


def _buckets(frequencies: Integers, bits: int) -> tuple[Integers, Integers]:
    """Frequencies as (N, buckets, width), zero-padded, and their sums (N, buckets)."""
    n, size = frequencies.shape
    width = 1 << bits
    buckets = -(-size // width)
    padded = np.zeros((n, buckets * width), dtype=np.int64)
    padded[:, :size] = frequencies
    fine = padded.reshape(n, buckets, width)
    return fine, fine.sum(axis=2)


def _floats(table: Integers) -> npt.NDArray[np.float64]:
    """The form `constriction` takes; integers below 2**53 are exact in it.

    Padding entries are zero: the coder gives each the smallest probability, which costs
    2**-24 of the mass and lets a damaged stream decode to them; the caller checks the range.
    """
    if table.shape[1] == 1:  # the coder refuses an alphabet of one: a second, unused symbol
        table = np.concatenate([table, np.zeros_like(table)], axis=1)
    return np.ascontiguousarray(table, dtype=np.float64)


class Encoder:
    """Codes symbols step by step into one stream of bytes."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def encode(self, frequencies: Integers, symbols: npt.NDArray[np.integer]) -> None:
        """Append N `symbols` under their N rows of `frequencies`."""
        n, size = frequencies.shape
        symbols = np.asarray(symbols)
        if symbols.shape != (n,):
            raise CodingError(f"{symbols.shape} symbols for {n} tables")
        if n == 0:
            return
        if symbols.min() < 0 or symbols.max() >= size:
            raise CodingError(f"a symbol outside [0, {size}): {symbols.min()}..{symbols.max()}")
        symbols = symbols.astype(np.int32)
        bits = bucket_bits(size)
        if bits == 0:
            self._coder.encode(symbols, _FAMILY, _floats(frequencies))
            return
        fine, coarse = _buckets(frequencies, bits)
        high = symbols >> bits
        self._coder.encode(high, _FAMILY, _floats(coarse))
        self._coder.encode(symbols & ((1 << bits) - 1), _FAMILY, _floats(fine[np.arange(n), high]))

    def encode_uniform(
        self, sizes: npt.NDArray[np.integer], symbols: npt.NDArray[np.integer]
    ) -> None:
        """Append `symbols` (N,), each uniform over [0, its size); sizes of 1 cost nothing."""
        wide = sizes > 1
        if wide.any():
            self._coder.encode(
                symbols[wide].astype(np.int32), _UNIFORM, sizes[wide].astype(np.int32)
            )

    def finish(self) -> bytes:
        """The coded bytes: big-endian words, without the zero bytes that end the last one.

        The decoder reads zeros past the end. So of all values in the coder's last interval
        [lower, lower + width), in units of 2**-64 of the last two words, that with the most
        trailing zero bytes is written: 1.7 bytes less a stream than constriction's own end.
        """
        words = self._coder.get_compressed()
        written, (lower, width) = self._coder.pos()
        if len(words) == written + 1:
            last = int(words[-1])
            for zeros in (32, 24, 16, 8):
                rounded = -(-last // (1 << zeros)) << zeros
                if rounded < 1 << 32 and lower <= rounded << 32 < lower + width:
                    words[-1] = rounded
                    break
        data = words.astype(">u4").tobytes()
        return data[:-4] + data[-4:].rstrip(b"\0")


class Decoder:
    """Reads back what an :class:`Encoder` wrote, given the same tables in the same order."""

    def __init__(self, stream: bytes) -> None:
        padded = stream + b"\0" * (-len(stream) % 4)
        self._coder = constriction.stream.queue.RangeDecoder(
            np.frombuffer(padded, dtype=">u4").astype(np.uint32)
        )

    def decode(self, frequencies: Integers) -> npt.NDArray[np.int64]:
        """The next N symbols. CodingError where the stream leaves the alphabet."""
        n, size = frequencies.shape
        if n == 0:
            return np.zeros(0, dtype=np.int64)
        bits = bucket_bits(size)
        try:
            if bits == 0:
                symbols = self._coder.decode(_FAMILY, _floats(frequencies)).astype(np.int64)
            else:
                fine, coarse = _buckets(frequencies, bits)
                high = self._coder.decode(_FAMILY, _floats(coarse)).astype(np.int64)
                if high.max() >= coarse.shape[1]:
                    raise CodingError("the stream does not decode under this model")
                low = self._coder.decode(_FAMILY, _floats(fine[np.arange(n), high]))
                symbols = (high << bits) + low.astype(np.int64)
        except (
            AssertionError
        ):  # constriction: "Tried to decode from compressed data that is invalid"
            raise CodingError("the stream does not decode under this model") from None
        if symbols.max() >= size:
            raise CodingError("the stream does not decode under this model")
        return symbols

    def decode_uniform(self, sizes: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """The next symbols (N,), each uniform over [0, its size)."""
        symbols = np.zeros(len(sizes), dtype=np.int64)
        wide = sizes > 1
        if wide.any():
            try:
                symbols[wide] = self._coder.decode(_UNIFORM, sizes[wide].astype(np.int32))
            except AssertionError:
                raise CodingError("the stream does not decode under this model") from None
        return symbols
