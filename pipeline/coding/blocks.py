"""A sequence of symbols coded under a model, in independent rows that advance as a batch.

The path of a symbol, the same in both directions (`_walk` is called by encode and decode):

1. `plan` cuts every item (a file, an image) into rows of nearly equal length, and gathers
   rows of all items, the longest first, into batches of at most `layout.rows`. The plan is a
   pure function of the items' lengths, so the decoder finds the same batches.
2. Each batch walks its positions through one cursor of the model: the table for position t
   is `cursor.next`, quantised to integers, and the symbols are fed back with `advance`. A row
   that has ended goes on with zeros, so that the batch keeps its shape and therefore, on one
   machine, every float its bits.
3. When the cursor stands at the end of the model's context, a new one is made and fed the
   last `overlap` symbols at once: each symbol costs O(1) work through the cache, and keeps
   at least `overlap` symbols of context.
4. Each file has its own stream: its rows that share a batch are interleaved in it.

What cutting costs: the first symbols of each row have no context before them. `least_row`
keeps rows long; `layout.rows = 1` codes an item as one row. `Coded.cut_bits` says what the
cuts cost: bits of the rows' first symbols above what the item's other symbols cost on average.

With `layout.adapt` the model learns on the way (`adapt.py`): every few positions a step is
taken on the symbols just coded, and a new cursor is made of the changed model.

Shapes: R rows of a batch, V symbols of the alphabet.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from chainrule.pipeline.coding.adapt import Adapt, Learner
from chainrule.pipeline.coding.entropy import (
    CodingError,
    Decoder,
    Encoder,
    Integers,
    UncodableError,
    quantise,
)
from chainrule.pipeline.config import Settings

CHECK_EVERY = 1 << 17
"""Symbols of a batch between two checks of what has been decoded so far (2 bytes each):
a decoder whose floats differ stops early instead of at the end. Whether the files are right is
not decided here but by their digest."""

Symbols = npt.NDArray[np.int64]


class Layout(Settings):
    """How a sequence is cut. Written into the container: the decoder must cut alike."""

    rows: int = Field(64, ge=1, description="rows coded as one batch, at most")
    least_row: int = Field(4096, ge=1, description="an item shorter than this is not cut")
    overlap: float = Field(
        0.5, ge=0, lt=1, description="part of the context kept when the context is full"
    )
    adapt: Adapt | None = Field(None, description="learn while coding, both sides alike")


class Model(Protocol):
    """What coding needs of a model: the cursor of `pipeline.models.contract.Autoregressive`."""

    event_shape: tuple[int, ...]

    def parameters(self) -> Iterator[Any]: ...

    def eval(self) -> Any: ...

    def cursor(self, batch: int, cond: Any = None) -> Any: ...


@dataclass(frozen=True)
class Row:
    """Symbols [start, stop) of an item."""

    item: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def plan(lengths: Sequence[int], layout: Layout, cut: bool = True) -> list[list[Row]]:
    """Batches of rows for items of these lengths; `cut` False keeps every item whole."""
    rows = []
    for item, length in enumerate(lengths):
        if length == 0:
            continue
        pieces = min(layout.rows, -(-length // layout.least_row)) if cut else 1
        step = -(-length // pieces)
        rows += [Row(item, start, min(start + step, length)) for start in range(0, length, step)]
    rows.sort(key=lambda row: -row.length)  # stable: equal lengths stay in order
    return [rows[i : i + layout.rows] for i in range(0, len(rows), layout.rows)]


def kept(context: int, layout: Layout) -> int:
    """Symbols that a new cursor is fed when the one before it is full."""
    return min(int(context * layout.overlap), context - 1)


def context_of(model: Model) -> int:
    """Elements of one event of the model: what a cursor can hold."""
    return math.prod(model.event_shape)


@dataclass
class Coded:
    """What coding gave: the streams, the checks, and what it should have cost."""

    streams: list[bytes]
    checks: list[int]
    ideal_bits: list[float]
    """Sum of -log2 p(symbol) under the model, one a stream."""
    cut_bits: list[float]
    """About how many of them the cuts into rows cost, one a stream."""


class _Bits:
    """-log2 p of the symbols of a batch: of the first `head` positions of each row, and after."""

    def __init__(self, rows: int, head: int) -> None:
        self.head = head
        self.bits = np.zeros((rows, 2))
        self.symbols = np.zeros((rows, 2), dtype=np.int64)

    def add(self, t: int, active: npt.NDArray[np.int64], bits: npt.NDArray[np.float64]) -> None:
        part = 0 if t < self.head else 1
        self.bits[active, part] += bits
        self.symbols[active, part] += 1


@torch.no_grad()  # not inference_mode: what a model caches must be fit for a learner's gradients
def _walk(
    model: Model,
    learner: Learner | None,
    rows: list[Row],
    layout: Layout,
    classes: Sequence[int] | None,
    symbols: Symbols,
    step: Callable[[list[int], Integers, int], None],
    bits: _Bits | None = None,
) -> Iterator[Symbols]:
    """Visit each position of a batch; yield the column (R,) of symbols, -1 where a row ended.

    `symbols` (R, L) holds what is known: all of it when encoding; decoding fills it, column t
    by `step(active rows, their tables, t)`. Past a row's end it is zero. UncodableError names
    the rows whose tables are no distributions.
    """
    device = next(iter(model.parameters())).device
    context = context_of(model)
    keep = kept(context, layout)
    length = rows[0].length
    lengths = np.array([row.length for row in rows])
    cond = None
    if classes is not None:
        cond = torch.tensor([classes[row.item] for row in rows], device=device)
    cursor = model.cursor(len(rows), cond)
    held = 0  # elements the cursor has been fed
    for t in range(length):
        learned = learner is not None and t > 0 and t % learner.settings.every == 0
        if learned:
            assert learner is not None
            learner.learn(symbols[:, :t], cond, lengths)
        if held == context or learned:
            held = min(keep, t)
            cursor = model.cursor(len(rows), cond)
            if held:
                cursor.advance(torch.from_numpy(symbols[:, t - held : t].copy()).to(device))
        conditional = cursor.next
        active = np.flatnonzero(lengths > t)
        if bits is not None:
            nats = conditional.log_prob(torch.from_numpy(symbols[:, t].copy()).to(device))
            bits.add(t, active, -nats.double().cpu().numpy()[active] / math.log(2))
        try:
            pmf = conditional.pmf()
        except TypeError as error:
            raise CodingError(f"the model has no discrete head: {error}") from None
        try:
            tables = quantise(pmf.float().cpu().numpy()[active])
        except UncodableError as error:
            raise UncodableError(str(error), active[error.places].tolist()) from None
        step(active.tolist(), tables, t)
        column = symbols[:, t].copy()
        held += 1
        if held < context and t + 1 < length:
            cursor.advance(torch.from_numpy(column[:, None].copy()).to(device))
        column[lengths <= t] = -1
        yield column


class _Checks:
    """16 bits of a running crc32 over the columns of a batch, every `CHECK_EVERY` symbols."""

    def __init__(self) -> None:
        self.crc, self.since = 0, 0

    def column(self, column: Symbols) -> int | None:
        self.crc = zlib.crc32(column.astype("<i4").tobytes(), self.crc)
        self.since += len(column)
        if self.since < CHECK_EVERY:
            return None
        self.since = 0
        return self.crc & 0xFFFF


def _spans(streams: list[int], active: list[int]) -> dict[int, list[int]]:
    """stream -> places in `active` of its rows."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(active):
        places.setdefault(streams[index], []).append(place)
    return places


def encode(
    model: Model,
    items: Sequence[Symbols],
    owners: Sequence[int],
    layout: Layout,
    classes: Sequence[int] | None = None,
    cut: bool = True,
    report: Callable[[int], None] = lambda symbols: None,
) -> Coded:
    """Code `items` under `model`. CodingError for symbols or models that cannot be coded;
    UncodableError names the streams of items under which the model's tables are no distributions.

    `owners`: the stream (file) each item belongs to, 0, 1, ... without a gap.
    `classes`: one an item, for a model with classes (-1: unconditional).
    `cut` False: every item is one event of the model (an image), never longer.
    `report` is told how many symbols each step coded.
    """
    model, learner = _prepare(model, layout)
    encoders = [Encoder() for _ in range(max(owners, default=-1) + 1)]
    price = _Price(len(encoders))
    checks: list[int] = []
    for rows in plan([len(item) for item in items], layout, cut):
        symbols = np.zeros((len(rows), rows[0].length), dtype=np.int64)
        for r, row in enumerate(rows):
            symbols[r, : row.length] = items[row.item][row.start : row.stop]
        bits = _Bits(len(rows), kept(context_of(model), layout))
        step = partial(_encode_step, encoders, [owners[row.item] for row in rows], symbols)
        running = _Checks()
        try:
            for column in _walk(model, learner, rows, layout, classes, symbols, step, bits):
                check = running.column(column)
                if check is not None:
                    checks.append(check)
                report(int((column >= 0).sum()))
        except UncodableError as error:
            streams = sorted({owners[rows[r].item] for r in error.places})
            raise UncodableError(str(error), streams) from None
        for r, row in enumerate(rows):
            price.add(owners[row.item], row, bits.bits[r], bits.symbols[r])
    return Coded(
        [encoder.finish() for encoder in encoders], checks, price.total.tolist(), price.of_cuts()
    )


class _Price:
    """What each stream should cost, and how much of it is the price of cutting."""

    def __init__(self, streams: int) -> None:
        self.total = np.zeros(streams)
        self._heads = np.zeros((streams, 2))  # bits and symbols: heads of rows after the first
        self._rest = np.zeros((streams, 2))

    def add(
        self,
        stream: int,
        row: Row,
        bits: npt.NDArray[np.float64],
        symbols: npt.NDArray[np.int64],
    ) -> None:
        self.total[stream] += bits.sum()
        if row.start > 0:
            self._heads[stream] += bits[0], symbols[0]
        self._rest[stream] += bits[1], symbols[1]

    def of_cuts(self) -> list[float]:
        typical = self._rest[:, 0] / np.maximum(self._rest[:, 1], 1)
        costs = self._heads[:, 0] - self._heads[:, 1] * typical
        return np.where(self._rest[:, 1] > 0, np.maximum(costs, 0), 0.0).tolist()


def _prepare(model: Model, layout: Layout) -> tuple[Model, Learner | None]:
    """The model that codes (a copy, if it is to learn) and its learner."""
    model.eval()
    if layout.adapt is None:
        return model, None
    learner = Learner(model, layout.adapt, context_of(model))
    return learner.model, learner


def _encode_step(
    encoders: list[Encoder],
    streams: list[int],
    symbols: Symbols,
    active: list[int],
    tables: Integers,
    t: int,
) -> None:
    column = symbols[active, t]
    for stream, places in _spans(streams, active).items():
        encoders[stream].encode(tables[places], column[places])


def decode(
    model: Model,
    streams: Sequence[bytes],
    lengths: Sequence[int],
    owners: Sequence[int],
    checks: Sequence[int],
    layout: Layout,
    classes: Sequence[int] | None = None,
    cut: bool = True,
    report: Callable[[int], None] = lambda symbols: None,
) -> list[Symbols]:
    """The items that `encode` coded. CodingError where a check fails."""
    model, learner = _prepare(model, layout)
    decoders = [Decoder(stream) for stream in streams]
    items = [np.zeros(length, dtype=np.int64) for length in lengths]
    expected = iter(checks)
    done = 0
    for rows in plan(lengths, layout, cut):
        symbols = np.zeros((len(rows), rows[0].length), dtype=np.int64)
        step = partial(_decode_step, decoders, [owners[row.item] for row in rows], symbols)
        running = _Checks()
        for column in _walk(model, learner, rows, layout, classes, symbols, step):
            check = running.column(column)
            if check is not None and check != next(expected, None):
                raise CodingError(
                    f"decoding went wrong after {done:,} symbols or up to {CHECK_EVERY:,} before: "
                    "the model's probabilities here are not those of the encoder"
                )
            done += int((column >= 0).sum())
            report(int((column >= 0).sum()))
        for r, row in enumerate(rows):
            items[row.item][row.start : row.stop] = symbols[r, : row.length]
    return items


def _decode_step(
    decoders: list[Decoder],
    streams: list[int],
    symbols: Symbols,
    active: list[int],
    tables: Integers,
    t: int,
) -> None:
    for stream, places in _spans(streams, active).items():
        symbols[[active[p] for p in places], t] = decoders[stream].decode(tables[places])
