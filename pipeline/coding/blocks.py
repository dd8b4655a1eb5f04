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
keeps rows long; `layout.rows = 1` codes an item as one row.

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

from chainrule.pipeline.coding.entropy import CodingError, Decoder, Encoder, Integers, quantise
from chainrule.pipeline.config import Settings

CHECK_EVERY = 1 << 17
"""Symbols of a batch between two checks of what has been decoded so far (4 bytes each):
a decoder whose floats differ stops early instead of at the end."""

Symbols = npt.NDArray[np.int64]


class Layout(Settings):
    """How a sequence is cut. Written into the container: the decoder must cut alike."""

    rows: int = Field(64, ge=1, description="rows coded as one batch, at most")
    least_row: int = Field(4096, ge=1, description="an item shorter than this is not cut")
    overlap: float = Field(
        0.5, ge=0, lt=1, description="part of the context kept when the context is full"
    )


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


@torch.inference_mode()
def _walk(
    model: Model,
    rows: list[Row],
    layout: Layout,
    classes: Sequence[int] | None,
    symbols: Symbols,
    step: Callable[[list[int], Integers, int], None],
    bits: npt.NDArray[np.float64] | None = None,
) -> Iterator[Symbols]:
    """Visit each position of a batch; yield the column (R,) of symbols, -1 where a row ended.

    `symbols` (R, L) holds what is known: all of it when encoding; decoding fills it, column t
    by `step(active rows, their tables, t)`. Past a row's end it is zero. When encoding, `bits`
    (R,) gathers -log2 p.
    """
    device = next(iter(model.parameters())).device
    context = context_of(model)
    keep = min(int(context * layout.overlap), context - 1)
    length = rows[0].length
    lengths = np.array([row.length for row in rows])
    cond = None
    if classes is not None:
        cond = torch.tensor([classes[row.item] for row in rows], device=device)
    cursor = model.cursor(len(rows), cond)
    held = 0  # elements the cursor has been fed
    for t in range(length):
        if held == context:
            cursor = model.cursor(len(rows), cond)
            if keep:
                cursor.advance(torch.from_numpy(symbols[:, t - keep : t].copy()).to(device))
            held = keep
        conditional = cursor.next
        active = np.flatnonzero(lengths > t)
        if bits is not None:
            nats = conditional.log_prob(torch.from_numpy(symbols[:, t].copy()).to(device))
            bits[active] -= nats.double().cpu().numpy()[active] / math.log(2)
        try:
            pmf = conditional.pmf()
        except TypeError as error:
            raise CodingError(f"the model has no discrete head: {error}") from None
        step(active.tolist(), quantise(pmf.float().cpu().numpy()[active]), t)
        column = symbols[:, t].copy()
        held += 1
        if held < context and t + 1 < length:
            cursor.advance(torch.from_numpy(column[:, None].copy()).to(device))
        column[lengths <= t] = -1
        yield column


class _Checks:
    """A running crc32 over the columns of a batch, taken every `CHECK_EVERY` symbols."""

    def __init__(self) -> None:
        self.crc, self.since = 0, 0

    def column(self, column: Symbols) -> int | None:
        self.crc = zlib.crc32(column.astype("<i4").tobytes(), self.crc)
        self.since += len(column)
        if self.since < CHECK_EVERY:
            return None
        self.since = 0
        return self.crc


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
    """Code `items` under `model`. CodingError for symbols or models that cannot be coded.

    `owners`: the stream (file) each item belongs to, 0, 1, ... without a gap.
    `classes`: one an item, for a model with classes (-1: unconditional).
    `cut` False: every item is one event of the model (an image), never longer.
    `report` is told how many symbols each step coded.
    """
    model.eval()
    encoders = [Encoder() for _ in range(max(owners, default=-1) + 1)]
    ideal = np.zeros(len(encoders))
    checks: list[int] = []
    for rows in plan([len(item) for item in items], layout, cut):
        symbols = np.zeros((len(rows), rows[0].length), dtype=np.int64)
        for r, row in enumerate(rows):
            symbols[r, : row.length] = items[row.item][row.start : row.stop]
        bits = np.zeros(len(rows))
        step = partial(_encode_step, encoders, [owners[row.item] for row in rows], symbols)
        running = _Checks()
        for column in _walk(model, rows, layout, classes, symbols, step, bits):
            check = running.column(column)
            if check is not None:
                checks.append(check)
            report(int((column >= 0).sum()))
        for r, row in enumerate(rows):
            ideal[owners[row.item]] += bits[r]
    return Coded([encoder.finish() for encoder in encoders], checks, ideal.tolist())


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
    model.eval()
    decoders = [Decoder(stream) for stream in streams]
    items = [np.zeros(length, dtype=np.int64) for length in lengths]
    expected = iter(checks)
    done = 0
    for rows in plan(lengths, layout, cut):
        symbols = np.zeros((len(rows), rows[0].length), dtype=np.int64)
        step = partial(_decode_step, decoders, [owners[row.item] for row in rows], symbols)
        running = _Checks()
        for column in _walk(model, rows, layout, classes, symbols, step):
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
