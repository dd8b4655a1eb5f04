"""Learning rate and batch size as functions of the step: nothing to save, nothing to resume."""

import math
from typing import Literal

from pydantic import Field, model_validator

from chainrule.pipeline.config import Settings


class ScheduleSettings(Settings):
    """Factor on the learning rate: a linear warm-up, then one of four shapes.

    - cosine: to `floor` along half a cosine (Loshchilov & Hutter 2017, section 3)
    - linear: to `floor` along a line
    - wsd: warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4.2): flat until the
      last `decay` of the steps, then along a line to `floor`
    - constant
    """

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    floor: float = Field(
        0.1, ge=0, le=1, description="factor that is reached when all steps are done"
    )
    decay: float = Field(0.2, gt=0, le=1, description="wsd: share of the steps that decay")

    def factor(self, step: int, steps: int) -> float:
        """The factor of update `step` (0-based) of `steps`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "constant":
            return 1.0
        if self.name == "wsd":
            length = max(1, round(self.decay * steps))
            start = max(self.warmup, steps - length)
            done = (step - start) / max(1, steps - start)
            return 1.0 if done <= 0 else 1.0 - (1.0 - self.floor) * min(done, 1.0)
        done = min((step - self.warmup) / max(1, steps - self.warmup), 1.0)
        if self.name == "linear":
            return 1.0 - (1.0 - self.floor) * done
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * done))


class BatchRamp(Settings):
    """A batch that grows in equal stages from `start` to the full one (Brown et al. 2020, 2.3)."""

    start: int = Field(ge=1, description="sequences a step at first")
    steps: int = Field(ge=1, description="steps until the full batch")
    increment: int = Field(1, ge=1, description="batches are multiples of it")

    @model_validator(mode="after")
    def _start_is_a_multiple(self) -> "BatchRamp":
        if self.start % self.increment:
            raise ValueError(f"start {self.start} is no multiple of increment {self.increment}")
        return self

    def batch_size(self, step: int, full: int) -> int:
        """Sequences of update `step` (0-based)."""
        if step >= self.steps:
            return full
        grown = self.start + (full - self.start) * step / self.steps
        return min(full, int(grown // self.increment) * self.increment)
