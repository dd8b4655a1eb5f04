"""Batches: the rows at positions [p, p + B) of the global order, and rank r's slice of them.

    position -- Interleave --> (set, its draw) -- // len(rows) --> (epoch, number)
             -- Rows -------> pieces of samples -- Shards -------> tensors

Every step is a pure function, so the batch of step s is the same for any number of ranks,
workers and restarts, and costs the same whether it is the first or the ten-millionth.
State to resume: two integers, the step and the position (rows consumed before it).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data.order import Interleave
from chainrule.pipeline.data.rows import ROW, SET, Rows, draw, rows_of
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.data.vocabulary import Vocabulary, join


class Piece(NamedTuple):
    """Tokens [start, stop) of a sample, as consumed in an epoch of its set."""

    set: int
    epoch: int
    sample: int
    start: int
    stop: int


@dataclass(frozen=True)
class Batch:
    """Rows of a step. T positions a row, row-major for grids."""

    x: Tensor
    """(B, T) long; float32 where elements are real numbers."""
    cond: Tensor | None
    """(B,) long, labels; -1 where a row has none. None where no row has one."""
    documents: Tensor | None
    """(B, T) long: which document of its row a position belongs to, -1 on padding."""
    mask: Tensor | None
    """(B, T) bool: False on padding. None: everything counts."""
    step: int
    position: int
    """Global position of the first row."""
    pieces: np.ndarray
    """int64 (m, 6): row, set, epoch, sample, start, stop of each piece."""
    captions: Tensor | None = None
    """(B, n) long: tokens of one of the sample's captions, the next one in each epoch, and -1 past
    its end; all -1 where a row has none. None where no row has one."""

    @property
    def ids(self) -> list[list[Piece]]:
        """The pieces of each row."""
        rows: list[list[Piece]] = [[] for _ in range(len(self.x))]
        for row, *piece in self.pieces.tolist():
            rows[row].append(Piece(*piece))
        return rows

    @property
    def tokens(self) -> int:
        """Positions that count."""
        return self.x.numel() if self.mask is None else int(self.mask.sum())

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {
            name: None if tensor is None else change(tensor)
            for name in ("x", "cond", "documents", "mask", "captions")
            for tensor in [getattr(self, name)]
        }
        return replace(self, **tensors)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The batch with its tensors in page-locked memory."""
        return self._with(Tensor.pin_memory)

    def split(self, n: int) -> list["Batch"]:
        """`n` micro-batches of equal size, in order. ValueError where it does not divide."""
        rows = len(self.x)
        if rows % n:
            raise ValueError(f"{rows} rows do not split into {n} equal micro-batches")
        size = rows // n
        parts = []
        for first in range(0, rows, size):
            rows_ = slice(first, first + size)
            inside = (self.pieces[:, ROW] >= first) & (self.pieces[:, ROW] < first + size)
            pieces = self.pieces[inside].copy()
            pieces[:, ROW] -= first
            part = self._with(lambda tensor, rows_=rows_: tensor[rows_])  # type: ignore[misc]
            parts.append(replace(part, position=self.position + first, pieces=pieces))
        return parts


@dataclass(frozen=True)
class Member:
    """One set of a mixture: its tokens, how they make rows, its way into the joint vocabulary."""

    tokens: TokenSet
    rows: Rows
    table: np.ndarray | None = None
    """int64 (vocabulary size,): joint id of each own id; None keeps ids as they are."""
    padding: int = 0
    """Token id (joint) on padding."""


class Mixture:
    """Sets drawn by weight (share of rows), each in epochs of its own. One is a mixture too.

    Weights None: each set by its number of rows, so that all epochs turn together.
    """

    def __init__(
        self,
        members: Sequence[Member],
        weights: Sequence[float | Fraction] | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """`vocabulary` is the joint one, where members have tables into it."""
        if not members:
            raise RequestError("a mixture of no sets")
        contexts = {member.rows.context for member in members}
        if len(contexts) > 1:
            raise RequestError(
                f"sets of one mixture have rows of {sorted(contexts)} tokens; give one context"
            )
        if weights is None:
            weights = [Fraction(len(member.rows)) for member in members]
        if len(weights) != len(members):
            raise RequestError(f"{len(weights)} weights for {len(members)} sets")
        self.members = list(members)
        self.context = contexts.pop()
        try:
            self.interleave = Interleave(weights)
        except ValueError as error:
            raise RequestError(str(error)) from None
        self.vocabulary = vocabulary or members[0].tokens.vocabulary
        self._packed = any(member.rows.packed for member in members)
        self._conditioned = any(member.tokens.classes is not None for member in members)
        # Several tokenizers' captions go to no model (training/assembly.py refuses those that ask).
        of_members = [member.tokens for member in members if member.tokens.captions is not None]
        alike = len({tokens.captions["fingerprint"] for tokens in of_members if tokens.captions})
        self.captions = joint_captions(of_members) if alike == 1 else None

    def epochs(self, position: int) -> list[float]:
        """Epochs that each set has gone through before `position`."""
        return [
            given / len(member.rows)
            for given, member in zip(self.interleave.before(position), self.members, strict=True)
        ]

    def pieces(self, position: int, stop: int) -> np.ndarray:
        """int64 (m, 6) of the rows at positions [position, stop), as in Batch.pieces."""
        return draw([member.rows for member in self.members], self.interleave, position, stop)

    def batch(
        self, position: int, size: int, rank: int = 0, world_size: int = 1, step: int = 0
    ) -> Batch:
        """Rank `rank`'s rows of the global batch of `size` rows at `position`."""
        if size % world_size:
            raise RequestError(f"a batch of {size} rows does not divide by {world_size} ranks")
        share = size // world_size
        first = position + rank * share
        return self._fetch(self.pieces(first, first + share), share, first, step)

    def _fetch(self, pieces: np.ndarray, rows: int, position: int, step: int) -> Batch:
        x = np.zeros((rows, self.context), self.vocabulary.batch_dtype)
        cond = np.full(rows, -1, np.int64) if self._conditioned else None
        captions = None
        if self.captions is not None:
            captions = np.full((rows, self.captions["longest"]), -1, np.int64)
        documents = np.full((rows, self.context), -1, np.int64) if self._packed else None
        mask = np.zeros((rows, self.context), np.bool_)
        for k, member in enumerate(self.members):
            if member.padding:
                x[np.unique(pieces[pieces[:, SET] == k, ROW])] = member.padding
        row, at, document = -1, 0, 0
        for number, k, epoch, i, start, stop in pieces.tolist():
            if number != row:
                row, at, document = number, 0, 0
            member = self.members[k]
            end = at + stop - start
            piece = member.tokens.piece(i, start, stop)
            if piece is not None:
                tokens, label, texts = piece
                x[row, at:end] = tokens if member.table is None else member.table[tokens]
                mask[row, at:end] = True
                if cond is not None and not member.rows.packed and label is not None:
                    cond[row] = label
                if captions is not None and texts is not None and not member.rows.packed:
                    ids = texts[(epoch + i) % len(texts)]
                    captions[row, : len(ids)] = ids
            if documents is not None:
                documents[row, at:end] = document
            at, document = end, document + 1
        whole = not self._packed and mask.all()
        return Batch(
            torch.from_numpy(x),
            torch.from_numpy(cond) if cond is not None else None,
            torch.from_numpy(documents) if documents is not None else None,
            None if whole else torch.from_numpy(mask),
            step,
            position,
            pieces,
            torch.from_numpy(captions) if captions is not None else None,
        )


def joint_captions(token_sets: Sequence[TokenSet]) -> dict[str, Any] | None:
    """TokenSet.captions of sets together; RequestError where two tokenizers made them."""
    found = [tokens.captions for tokens in token_sets if tokens.captions is not None]
    if not found:
        return None
    prints = {captions["fingerprint"] for captions in found}
    if len(prints) > 1:
        raise RequestError(
            "the sets' captions are tokens of several tokenizers "
            f"({', '.join(sorted(print_[:16] for print_ in prints))}); pretokenize with one"
        )
    return {**found[0], "longest": max(captions["longest"] for captions in found)}


def joint_vocabulary(
    token_sets: Sequence[TokenSet],
) -> tuple[Vocabulary, list[np.ndarray | None]]:
    """The vocabulary of a mixture of the sets, and each set's table into it (None: as it is)."""
    prints = list(dict.fromkeys(tokens.tokenizer_fingerprint for tokens in token_sets))
    of = {tokens.tokenizer_fingerprint: tokens.vocabulary for tokens in token_sets}
    if len(prints) == 1:
        return of[prints[0]], [None] * len(token_sets)
    if any(of[fingerprint].continuous for fingerprint in prints):
        raise RequestError(
            "tables of real numbers are not mixed with sets of another tokenizer; "
            "train a model on each"
        )
    vocabulary, tables = join([of[fingerprint] for fingerprint in prints])
    return vocabulary, [tables[prints.index(t.tokenizer_fingerprint)] for t in token_sets]


def mixture_of(
    token_sets: Sequence[TokenSet],
    context: int | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    shuffle: bool = True,
) -> Mixture:
    """Token sets as a mixture over one vocabulary, with rows of `context` tokens.

    Sets of one tokenizer share its ids; those of several are moved into their joint space
    (vocabulary.join). `context` None takes the grid's size. RequestError.
    """
    if not token_sets:
        raise RequestError("a mixture of no sets")
    if context is None:
        sizes = {int(np.prod(tokens.grid)) for tokens in token_sets if tokens.grid is not None}
        context = max(sizes) if sizes else None
    vocabulary, tables = joint_vocabulary(token_sets)
    padding = vocabulary.specials.get("eos", 0)
    members = []
    for tokens, table in zip(token_sets, tables, strict=True):
        rows = rows_of(tokens, context, seed, shuffle)
        members.append(Member(tokens, rows, table, padding))
    return Mixture(members, weights, vocabulary)


class Loader:
    """An endless iterator over rank r's slices of the global batches, fetched ahead by threads.

        with Loader(mixture, 64, rank=0, world_size=2, step=1000) as loader:
            for batch in loader: ...

    The batches do not depend on `workers` or `ahead`. `workers` 0 fetches when asked.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: "int | Sequence[tuple[int, int]]",
        rank: int = 0,
        world_size: int = 1,
        step: int = 0,
        position: int | None = None,
        workers: int = 1,
        ahead: int = 4,
        pin: bool = False,
    ) -> None:
        """`batch_size`: rows of a global batch, or [(from_step, rows), ...], the first at 0.

        `step` and `position` are what `state()` gave; position None is that of a run that
        passed nothing over. `pin` puts batches into page-locked memory, from which `to` copies
        to a GPU without a wait. RequestError where a batch does not divide by the ranks.
        """
        ramp = [(0, batch_size)] if isinstance(batch_size, int) else list(batch_size)
        if not ramp or ramp[0][0] != 0 or [s for s, _ in ramp] != sorted({s for s, _ in ramp}):
            raise RequestError(f"batch sizes {ramp}: steps must start at 0 and rise")
        for _, size in ramp:
            if size < 1 or size % world_size:
                raise RequestError(
                    f"a batch of {size} rows does not divide by {world_size} ranks; "
                    f"take a multiple of {world_size}"
                )
        self._ramp = ramp
        self.mixture, self.rank, self.world_size, self._pin = mixture, rank, world_size, pin
        self._step = step
        self._position = self._position_of(step) if position is None else position
        self.stalled = 0.0
        """Seconds that `next` has waited for a batch."""
        self._ahead = max(ahead, workers)
        self._next_step, self._next_position = self._step, self._position
        self._pending: deque[Future[Batch]] = deque()
        self._pool = ThreadPoolExecutor(workers, "loader") if workers else None
        self._fill()

    def batch_size(self, step: int) -> int:
        """Rows of the global batch of a step."""
        return next(size for start, size in reversed(self._ramp) if start <= step)

    def _position_of(self, step: int) -> int:
        position = 0
        stops = [start for start, _ in self._ramp[1:]]
        for (start, size), stop in zip(self._ramp, [*stops, step], strict=True):
            position += size * max(min(stop, step) - start, 0)
        return position

    def state(self) -> dict[str, int]:
        """Of the batch that `next` gives: {"step": s, "position": rows consumed before it}."""
        return {"step": self._step, "position": self._position}

    def skip(self, rows: int) -> None:
        """Pass over a data window of `rows` rows: the next batch starts after it."""
        self._drop()
        self._position += rows
        self._next_step, self._next_position = self._step, self._position
        self._fill()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        if self._pool is None:
            batch = self._make(self._step, self._position)
        else:
            batch = self._pending.popleft().result()
        self.stalled += time.perf_counter() - began
        self._position += self.batch_size(self._step)
        self._step += 1
        self._fill()
        return batch

    def _make(self, step: int, position: int) -> Batch:
        size = self.batch_size(step)
        batch = self.mixture.batch(position, size, self.rank, self.world_size, step)
        return batch.pinned() if self._pin else batch

    def _fill(self) -> None:
        if self._pool is None:
            return
        while len(self._pending) < self._ahead:
            self._pending.append(
                self._pool.submit(self._make, self._next_step, self._next_position)
            )
            self._next_position += self.batch_size(self._next_step)
            self._next_step += 1

    def _drop(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()

    def close(self) -> None:
        """Stop the threads."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def sequential(
    mixture: Mixture, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Rank's slices of one epoch of a single set, each row once over all ranks: validation.

    All ranks get the same number of batches. The last may be short; a rank that has no row
    of it gets one that is masked out whole, so that collective operations stay in step.
    """
    if len(mixture.members) != 1:
        raise RequestError("validation goes through one set at a time")
    total = len(mixture.members[0].rows)
    for step, first in enumerate(range(0, total, batch_size)):
        size = min(batch_size, total - first)
        low, high = first + rank * size // world_size, first + (rank + 1) * size // world_size
        if low < high:
            yield mixture._fetch(mixture.pieces(low, high), high - low, low, step)
        else:
            empty = mixture._fetch(mixture.pieces(first, first + 1), 1, first, step)
            mask = torch.zeros_like(empty.x, dtype=torch.bool)
            yield replace(empty, mask=mask, pieces=empty.pieces[:0])
