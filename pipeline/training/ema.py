"""Exponential moving average of the weights (Polyak & Juditsky 1992).

It follows the float32 master weights, whole or sharded as the engine holds them, and so
costs no communication and as much memory as the masters do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ExponentialAverage:
    """ema <- decay * ema + (1 - decay) * weights, with a short memory at first.

    The decay of update t is min(decay, (1 + t) / (10 + t)), as in TensorFlow's
    ExponentialMovingAverage: the random initial weights are forgotten early.
    """

    def __init__(self, decay: float, masters: list[Tensor]) -> None:
        self.decay = decay
        self.updates = 0
        self._masters = masters
        self.tensors = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.tensors, [m.detach() for m in self._masters], 1 - decay)

    @contextmanager
    def in_place_of_masters(self) -> Iterator[None]:
        """The average lies where the masters lie, and they where it does, for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.tensors, self._masters, strict=True):
            kept = master.detach().clone()
            master.detach().copy_(average)
            average.copy_(kept)
