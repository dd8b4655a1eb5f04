"""Online learning while coding: the model trains on what both sides already know.

After every `every` positions the encoder and the decoder take the same gradient step on the
symbols just coded, so that the tables that follow are those of a model that has seen them
(Bellard, "Lossless data compression with neural networks", 2019: NNCP, section 2). Nothing
of it is transmitted. The model given is copied; its folder never changes.

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


class Adapt(Settings):
    """How the model learns while it codes. Written into the container."""

    learning_rate: float = Field(1e-3, gt=0, description="of AdamW")
    every: int = Field(32, ge=1, description="positions (of all rows) between two steps")
    steps: int = Field(1, ge=1, description="gradient steps each time")
    warmup: int = Field(10, ge=0, description="steps over which the rate rises to its value")
    weight_decay: float = Field(0.0, ge=0)


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

    def __init__(self, model: Any, settings: Adapt) -> None:
        self.model = copy.deepcopy(model).eval()  # eval: dropout would need a shared generator
        self.settings = settings
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        self._optimiser = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
        )
        self._taken = 0

    def learn(
        self,
        x: torch.Tensor,
        cond: torch.Tensor | None,
        counted: npt.NDArray[np.bool_],
        first: int,
    ) -> None:
        """Step on windows x (R, t): the mean of -log p over positions from `first` on that
        are `counted` (R, t), that is, not past the end of their row."""
        weight = torch.from_numpy(counted[:, first:].astype(np.float32)).to(x.device)
        if not bool(weight.any()):
            return
        with torch.enable_grad(), deterministic():
            for _ in range(self.settings.steps):
                self._taken += 1
                rise = min(1.0, self._taken / max(self.settings.warmup, 1))
                for group in self._optimiser.param_groups:
                    group["lr"] = self.settings.learning_rate * rise
                nats = -self.model.log_prob(x, cond)[:, first:].float()
                loss = (nats * weight).sum() / weight.sum()
                self._optimiser.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self._optimiser.step()
