"""Cursors whose rows stand at positions of their own: what ragged acceptance needs.

A contract cursor has one position for all of its rows. Transformers have a cursor that takes
back a different number of elements from each row (models/ragged.py): one call serves the batch
and reads the weights once. With other families every row gets a cursor to itself.

Legend: B rows, k elements fed to a row, W the widest k, V tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from chainrule.pipeline.models import native
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.decoder import Decoder
from chainrule.pipeline.models.ragged import RaggedCursor
from chainrule.pipeline.sampling.sampler import log_probs_of, open_cursor


class Rows(ABC):
    """B rows of a model, each fed and rewound by itself."""

    fed: list[list[int]]
    """The elements that each row holds."""

    @abstractmethod
    def feed(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Feed k_b elements to row b; log-probabilities of what follows each, (B, W, V).

        Row b's are its first k_b columns, the rest is meaningless. No row may be fed to the
        last element of the event: nothing follows it.
        """

    @abstractmethod
    def rewind(self, counts: Sequence[int]) -> None:
        """Forget the last `counts[b]` elements of row b."""


@native.allowed()
def open_rows(model: Autoregressive, batch: int, cond: Tensor | None = None) -> Rows:
    """Rows at the start of `batch` events."""
    if batch > 1 and isinstance(model, Decoder):
        return SharedRows(model, batch, cond)
    return SeparateRows(model, batch, cond)


class SeparateRows(Rows):
    """A cursor a row: works with every family."""

    def __init__(self, model: Autoregressive, batch: int, cond: Tensor | None) -> None:
        self.device = next(model.parameters()).device
        self.cursors = [
            open_cursor(model, 1, None if cond is None else cond[row : row + 1])
            for row in range(batch)
        ]
        self.fed = [[] for _ in range(batch)]

    def feed(self, new: Sequence[Sequence[int]]) -> Tensor:
        found: list[Tensor | None] = []
        for row, tokens in enumerate(new):
            if len(tokens) == 0:
                found.append(None)
                continue
            x = torch.tensor([list(tokens)], device=self.device)
            found.append(log_probs_of(self.cursors[row].advance(x)))
            self.fed[row].extend(tokens)
        some = next(f for f in found if f is not None)
        if len(new) == 1:
            return some
        width = max(len(tokens) for tokens in new)
        out = some.new_zeros(len(new), width, some.shape[-1])
        for row, log_probs in enumerate(found):
            if log_probs is not None:
                out[row, : log_probs.shape[1]] = log_probs[0]
        return out

    def rewind(self, counts: Sequence[int]) -> None:
        for row, n in enumerate(counts):
            if n:
                self.cursors[row].rewind(int(n))
                del self.fed[row][-n:]


class SharedRows(Rows):
    """One cursor for all rows of a Transformer.

    Rows that are fed less than the widest are filled up: on the right with elements that are
    taken back afterwards, or, near the end of the event, on the left with elements that they
    held already.
    """

    def __init__(self, model: Decoder, batch: int, cond: Tensor | None) -> None:
        self.device = next(model.parameters()).device
        self.cursor = RaggedCursor(model, batch, cond)
        self.most = model.config.context - 1
        self.fed = [[] for _ in range(batch)]

    def feed(self, new: Sequence[Sequence[int]]) -> Tensor:
        width = max(len(tokens) for tokens in new)
        left, right, columns = [], [], []
        for fed, tokens in zip(self.fed, new, strict=True):
            spare = width - len(tokens)
            room = self.most - len(fed) - len(tokens)
            left.append(max(0, spare - room))
            right.append(spare - left[-1])
            again = fed[len(fed) - left[-1] :]
            columns.append([*again, *tokens, *([0] * right[-1])])
        if any(left):
            self.cursor.rewind_rows(torch.tensor(left, device=self.device))
        log_probs = log_probs_of(self.cursor.advance(torch.tensor(columns, device=self.device)))
        if any(right):
            self.cursor.rewind_rows(torch.tensor(right, device=self.device))
        for fed, tokens in zip(self.fed, new, strict=True):
            fed.extend(tokens)
        if not any(left):
            return log_probs
        index = torch.arange(width, device=self.device) + torch.tensor(
            left, device=self.device
        ).unsqueeze(1)
        index = index.clamp(max=width - 1).unsqueeze(-1).expand_as(log_probs)
        return log_probs.gather(1, index)

    def rewind(self, counts: Sequence[int]) -> None:
        if any(counts):
            self.cursor.rewind_rows(torch.tensor(list(counts), device=self.device))
            for fed, n in zip(self.fed, counts, strict=True):
                if n:
                    del fed[-n:]
