"""Rows: what one epoch of a token set is cut into, and in which order they come.

A row is a run of `context` positions: one whole sample (FixedRows), or pieces of documents
packed into a window (PackedRows). Rows know lengths only; batches.py fetches the tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data.order import Interleave, Permutation
from chainrule.pipeline.data.packing import Packing
from chainrule.pipeline.data.tokens import TokenSet

ROW, SET, EPOCH, SAMPLE, START, STOP = range(6)  # columns of what `draw` gives


class Pieces(NamedTuple):
    """Pieces of samples in rows, each field int64 (m,); rows rise."""

    row: np.ndarray
    sample: np.ndarray
    start: np.ndarray
    stop: np.ndarray


LONGEST_EVENT = 65_536
"""Tokens of recordings of one length that make a row each without being asked to."""


class Rows(ABC):
    """`len(rows)` rows an epoch, the same number in each; row j is computed from j."""

    context: int
    """Positions of a row."""
    packed: bool
    """Whether a row may hold several documents, or padding."""

    def __init__(self, seed: int, shuffle: bool) -> None:
        self.seed, self.shuffle = seed, shuffle

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pieces(self, epoch: int, numbers: np.ndarray) -> Pieces:
        """What rows `numbers` (m,) of an epoch's order hold; `row` counts from 0 to m - 1."""

    @property
    @abstractmethod
    def waste(self) -> float:
        """Share of positions that are padding."""

    def _ordered(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        return Permutation(len(self), self.seed, epoch)[numbers] if self.shuffle else numbers


class FixedRows(Rows):
    """Samples of equal length, one a row: images, recordings."""

    packed = False
    waste = 0.0

    def __init__(self, samples: int, context: int, seed: int = 0, shuffle: bool = True) -> None:
        super().__init__(seed, shuffle)
        self._samples, self.context = samples, context

    def __len__(self) -> int:
        return self._samples

    def pieces(self, epoch: int, numbers: np.ndarray) -> Pieces:
        samples = self._ordered(epoch, numbers)
        zeros = np.zeros_like(samples)
        return Pieces(np.arange(len(samples)), samples, zeros, zeros + self.context)


class PackedRows(Rows):
    """Documents packed into windows: text, audio, sets of mixed length."""

    packed = True

    def __init__(
        self, lengths: np.ndarray, context: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        """`lengths` int64 (samples,) in tokens; `context` is the length of a window."""
        super().__init__(seed, shuffle)
        self.context = context
        self.packing = Packing(lengths, context)

    def __len__(self) -> int:
        return self.packing.windows

    @property
    def waste(self) -> float:
        return self.packing.waste

    def pieces(self, epoch: int, numbers: np.ndarray) -> Pieces:
        windows = self._ordered(epoch, numbers)
        return Pieces(*self.packing.pieces(windows, self.seed, epoch, self.shuffle))


def one_length(tokens: TokenSet) -> int | None:
    """Tokens of every sample: the grid's, or of recordings that all last as long; else None."""
    if tokens.grid is not None:
        return int(np.prod(tokens.grid))
    if tokens.modality != "audio":
        return None
    lengths = tokens.lengths
    return int(lengths[0]) if (lengths == lengths[0]).all() else None


def rows_of(
    tokens: TokenSet, context: int | None = None, seed: int = 0, shuffle: bool = True
) -> Rows:
    """Rows of a token set: FixedRows where every sample has `context` tokens, else PackedRows.

    `context` None takes the samples' length. RequestError where they have several.
    """
    size = one_length(tokens)
    if context is None:
        if size is None:
            raise RequestError(
                f"{tokens.shards.folder}: its samples differ in length; say a context to pack to"
            )
        context = size
    if size == context:
        return FixedRows(tokens.samples, context, seed, shuffle)
    if not tokens.lengths.any():
        raise RequestError(f"{tokens.shards.folder}: split '{tokens.split}' holds no tokens")
    return PackedRows(tokens.lengths, context, seed, shuffle)


def draw(rows: Sequence[Rows], interleave: Interleave, position: int, stop: int) -> np.ndarray:
    """What the rows at global positions [position, stop) hold: int64 (m, 6), rows rising.

    Columns: row (from 0), set, epoch, sample, start, stop.
    """
    sets, draws = interleave.draws(position, stop)
    parts = [np.zeros((0, 6), np.int64)]
    for k, of in enumerate(rows):
        of_set = np.flatnonzero(sets == k)
        epochs, numbers = np.divmod(draws[of_set], len(of))
        for epoch in np.unique(epochs).tolist():
            here = of_set[epochs == epoch]
            found = of.pieces(epoch, numbers[epochs == epoch])
            part = np.empty((len(found.row), 6), np.int64)
            part[:, ROW], part[:, SET], part[:, EPOCH] = here[found.row], k, epoch
            part[:, SAMPLE], part[:, START], part[:, STOP] = found[1:]
            parts.append(part)
    table = np.concatenate(parts)
    return table[np.argsort(table[:, ROW], kind="stable")]
