"""Exact likelihoods of data under a model, in bounded memory.

Two ways of scoring, by what the data are to the model:

- **events** (images, fixed-length vectors): `model.log_prob`, all elements of one event.
- **documents** (text, audio, of any length): windows of the model's context. The first window
  scores its every element from the start symbol on; each later one moves on by `stride`
  elements and scores those alone, with the rest of the window as their context. So every
  element is scored exactly once, under a conditional of the model, given between
  context - stride and context - 1 elements before it.

Everything is in nats; what divides them (tokens, pixels, bytes, words) is said by the caller.
Shapes: B windows of a batch, T elements of a window.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chainrule.pipeline.models.contract import Autoregressive

Nats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """Elements [start, stop) of a sequence; those from `scored` on are scored here."""

    start: int
    stop: int
    scored: int


def windows(length: int, context: int, stride: int) -> Iterator[Window]:
    """The windows of a sequence of `length` elements; each element is scored in one of them."""
    if not 1 <= stride <= context:
        raise ValueError(f"stride {stride} is not within 1..{context} (the model's context)")
    done = 0
    while done < length:
        stop = min(length, context if done == 0 else done + stride)
        yield Window(max(0, stop - context), stop, done)
        done = stop


@torch.inference_mode()
def score_documents(
    model: Autoregressive,
    documents: Iterable[tuple[npt.NDArray[np.integer], int | None]],
    stride: int,
    batch_size: int,
) -> Iterator[Nats]:
    """-log p of each element of each document (tokens (t,), class or None), in the order given.

    Windows of up to `batch_size` x 8 at a time are gathered, sorted by length and scored in
    batches of like length; what is held is bounded by that and one document.
    """
    model.eval()
    device = next(model.parameters()).device
    context = math.prod(model.event_shape)
    waiting: list[tuple[npt.NDArray[np.integer], int | None, Nats]] = []
    pieces: list[tuple[int, Window]] = []

    def flush() -> Iterator[Nats]:
        pieces.sort(key=lambda piece: piece[1].stop - piece[1].start)
        for at in range(0, len(pieces), batch_size):
            some = pieces[at : at + batch_size]
            longest = max(w.stop - w.start for _, w in some)
            x = np.zeros((len(some), longest), dtype=np.int64)
            for row, (i, w) in enumerate(some):
                x[row, : w.stop - w.start] = waiting[i][0][w.start : w.stop]
            labels = [waiting[i][1] for i, _ in some]
            cond = None
            if any(label is not None for label in labels):
                known = [-1 if label is None else label for label in labels]
                cond = torch.tensor(known, device=device)
            scores = model.log_prob(torch.from_numpy(x).to(device), cond)
            nats = -scores.float().cpu().numpy()
            for row, (i, w) in enumerate(some):
                waiting[i][2][w.scored : w.stop] = nats[row, w.scored - w.start : w.stop - w.start]
        pieces.clear()
        finished = [nats for _, _, nats in waiting]
        waiting.clear()
        yield from finished

    for document, label in documents:
        i = len(waiting)
        waiting.append((document, label, np.zeros(len(document), dtype=np.float32)))
        pieces += [(i, window) for window in windows(len(document), context, stride)]
        if len(pieces) >= 8 * batch_size:
            yield from flush()
    yield from flush()


@torch.inference_mode()
def score_events(
    model: Autoregressive,
    events: Iterable[tuple[Tensor, Tensor | None]],
) -> Iterator[Nats]:
    """-log p of each element, (T,) in generation order, of each event of batches (x, cond)."""
    model.eval()
    device = next(model.parameters()).device
    for x, cond in events:
        given = None if cond is None else cond.to(device)
        yield from -model.log_prob(x.to(device), given).float().cpu().numpy()


@dataclass
class Tally:
    """Running sums over scored elements: total, by position in the sequence, by class.

    Exact in float64 whatever the order of the parts, to about 1e-12 relative.
    """

    positions: int
    nats: float = 0.0
    elements: int = 0
    samples: int = 0
    by_position: npt.NDArray[np.float64] = field(init=False)
    count_by_position: npt.NDArray[np.int64] = field(init=False)
    by_class: dict[int, list[float]] = field(default_factory=dict)
    """class -> [nats, elements]"""

    def __post_init__(self) -> None:
        self.by_position = np.zeros(self.positions)
        self.count_by_position = np.zeros(self.positions, dtype=np.int64)

    def add(self, nats: Nats, label: int | None = None) -> None:
        """One sample's nats; positions past `positions` count into the total alone."""
        total = float(nats.sum(dtype=np.float64))
        self.nats += total
        self.elements += len(nats)
        self.samples += 1
        n = min(len(nats), self.positions)
        self.by_position[:n] += nats[:n]
        self.count_by_position[:n] += 1
        if label is not None:
            sums = self.by_class.setdefault(label, [0.0, 0])
            sums[0] += total
            sums[1] += len(nats)

    @property
    def mean(self) -> float:
        """Nats an element."""
        return self.nats / max(self.elements, 1)

    def curve(self) -> list[tuple[int, float]]:
        """(position, mean nats there), positions that no sample reached left out."""
        reached = np.flatnonzero(self.count_by_position)
        means = self.by_position[reached] / self.count_by_position[reached]
        return list(zip(reached.tolist(), means.tolist(), strict=True))


def unigram_nats(training: npt.NDArray[np.int64], held_out: npt.NDArray[np.int64]) -> float:
    """Nats a token of the best context-free guess: the training tokens' frequencies.

    Both arguments are counts (V,). Add-one smoothed, so that a token unseen in training has
    a finite cost. It is a cross-entropy: scored on the held-out counts.
    """
    smoothed = training.astype(np.float64) + 1
    log_q = np.log(smoothed / smoothed.sum())
    return float(-(held_out * log_q).sum() / max(held_out.sum(), 1))


def position_picture(path: Any, curve: list[tuple[int, float]], unit: str, title: str) -> None:
    """A PNG of mean nats against position; at most 64 bins, so that noise does not hide it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    edges = np.array_split(np.array(curve), min(64, len(curve)))
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([part[:, 0].mean() for part in edges], [part[:, 1].mean() for part in edges])
    axes.set_xlabel(f"position ({unit}s since the start)")
    axes.set_ylabel(f"nats a {unit}")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
