"""Online learning while coding: the model trains on what both sides already know.

After every `every` positions the encoder and the decoder take the same gradient steps: one on
the symbols just coded with what stands before them, the others on windows drawn from all that
was coded so far, from the same generator on both sides. The tables that follow are those of a
model that has seen them (Bellard, "Lossless data compression with neural networks", 2019:
NNCP, section 2; replay as in Bellard 2021, NNCP v2, section 3). Nothing of it is transmitted.
The model given is copied; its folder never changes.

Both sides must take bit-equal steps: deterministic kernels are asked for, and the numeric
contract of the container holds here as it does for the tables.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from chainrule.pipeline.config import Settings
from chainrule.pipeline.training.optimizers import (
    OptimizerSettings,
    build_optimizer,
    set_learning_rate,
)


class Adapt(Settings):
    """How the model learns while it codes. Written into the container."""

    optimizer: OptimizerSettings = OptimizerSettings(
        name="muon", learning_rate=3e-3, betas=(0.9, 0.99), weight_decay=0.0
    )
    every: int = Field(64, ge=1, description="positions (of all rows) between two updates")
    steps: int = Field(
        4, ge=1, le=1024, description="gradient steps an update: the newest, then replayed"
    )
    warmup: int = Field(10, ge=0, description="steps over which the rate rises to its value")
    clip: float = Field(1.0, gt=0, description="norm that gradients are clipped to")


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that give the same floats twice, or an error; what was set before comes back."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


class Learner:
    """A copy of the model, and the optimiser that both sides run alike."""

    def __init__(self, model: Any, settings: Adapt, context: int) -> None:
        """`context`: the most elements that the model takes."""
        self.model = copy.deepcopy(model).eval()  # eval: dropout would need a shared generator
        self.settings = settings
        self.context = context
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        self._optimiser = build_optimizer(self.model, settings.optimizer)
        self._replay = np.random.default_rng(0)
        self._taken = 0

    def learn(
        self,
        symbols: npt.NDArray[np.int64],
        cond: torch.Tensor | None,
        lengths: npt.NDArray[np.int64],
    ) -> None:
        """Steps after `symbols` (R, t), of rows that end after `lengths` (R,) positions: what
        stands past a row's end teaches nothing."""
        rows, seen = symbols.shape
        newest = max(0, seen - self.context)
        for step in range(self.settings.steps):
            starts = np.full(rows, newest)
            if step and newest:
                starts = self._replay.integers(0, newest + 1, rows)
            places = starts[:, None] + np.arange(min(seen, self.context))
            self._step(np.take_along_axis(symbols, places, 1), cond, places < lengths[:, None])

    def _step(
        self,
        x: npt.NDArray[np.int64],
        cond: torch.Tensor | None,
        counted: npt.NDArray[np.bool_],
    ) -> None:
        if not counted.any():
            return
        device = next(self.model.parameters()).device
        weight = torch.from_numpy(counted.astype(np.float32)).to(device)
        with torch.enable_grad(), deterministic():
            self._taken += 1
            set_learning_rate(self._optimiser, min(1.0, self._taken / max(self.settings.warmup, 1)))
            nats = -self.model.log_prob(torch.from_numpy(x).to(device), cond).float()
            loss = (nats * weight).sum() / weight.sum()
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
            self._optimiser.step()
