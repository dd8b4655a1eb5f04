"""What the cursors of convolutional and masked networks share: where they stand, and checks."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from chainrule.pipeline.models.contract import Conditional, Cursor
from chainrule.pipeline.models.inputs import check_tensor, check_values


class CachedCursor(Cursor):
    """A family says how known elements enter its caches and how the parameters of a run of
    elements follow from them; this class keeps the position.

    `conditional` makes parameters (..., P) into distributions; an event has `length` elements.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        vocabulary_size: int | None,
        conditional: Callable[[Tensor], Conditional],
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch is {batch}: a cursor stands on 1 event or more")
        self.batch = batch
        self.length = length
        self.vocabulary_size = vocabulary_size
        self.conditional = conditional
        self.position = 0
        self._next: Tensor

    @abstractmethod
    def _write(self, first: int, x: Tensor) -> None:
        """Known elements (B, k), k >= 1, at positions first, first + 1, ..."""

    @abstractmethod
    def _predict(self, first: int, end: int) -> Tensor:
        """(B, end - first, P): parameters of elements first..end-1, those before being
        written. Each position is asked for in order, except after a `rewind`, when it goes
        on from an earlier one."""

    @torch.no_grad()
    def _start(self) -> None:
        self._next = self._predict(0, 1)[:, 0]

    @property
    def next(self) -> Conditional:
        if self.position == self.length:
            raise ValueError(f"the event is complete: it has {self.length} elements")
        return self.conditional(self._next)

    @torch.no_grad()
    def advance(self, x: Tensor) -> Conditional:
        check_tensor("x", x)
        if x.dim() != 2 or len(x) != self.batch:
            raise ValueError(f"x has shape {tuple(x.shape)}: the cursor takes ({self.batch}, k)")
        x = check_values(x, self.vocabulary_size)
        start, stop = self.position, self.position + x.shape[1]
        if stop > self.length:
            raise ValueError(
                f"x has {x.shape[1]} elements at position {start}: the event has {self.length}"
            )
        if stop > start:
            self._write(start, x)
        self.position = stop
        first, end = start + 1, min(stop + 1, self.length)
        if end <= first:
            return self.conditional(self._next.unsqueeze(1)[:, :0])
        parameters = self._predict(first, end)
        self._next = parameters[:, -1]
        return self.conditional(parameters)

    @torch.no_grad()
    def rewind(self, n: int) -> None:
        if not 0 <= n <= self.position:
            raise ValueError(f"n is {n}: {self.position} elements can be forgotten")
        if n:
            self.position -= n
            self._next = self._predict(self.position, self.position + 1)[:, 0]
