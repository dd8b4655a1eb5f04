"""Faults of learning: what counts as one, and when it is time to go back or to give up.

a step whose gradient is not finite, or whose loss lies far above the recent ones,
    is skipped and counted, with its sample ids, in faults.jsonl
a step of fp16 whose gradient overflows while the loss scale can still fall is counted there
    too; it is a fault only as one of many in a row, for a scale that grows overflows now and then
`consecutive` of them in a row: back to the last good checkpoint; the data windows
    that led here are not read again
more than `rollbacks` of those: the stage fails, by name
"""

import json
import math
from pathlib import Path
from typing import Any

from pydantic import Field

from chainrule.pipeline.config import Settings
from chainrule.pipeline.whole_file import write_whole


class FaultSettings(Settings):
    """When a step is skipped, and what follows."""

    spike_sigma: float | None = Field(
        6.0, gt=0, description="standard deviations above the recent losses; null: never"
    )
    window: int = Field(100, ge=2, description="recent losses that are looked at")
    consecutive: int = Field(5, ge=1, description="faults in a row that cause a rollback")
    rollbacks: int = Field(3, ge=0, description="rollbacks before the stage fails")
    overflows: int = Field(
        12, ge=1, description="fp16: overflows in a row from which on each is a fault"
    )


class FaultMonitor:
    """Judges each step's loss and gradient norm; its state is part of a checkpoint.

    All ranks see the same numbers and so judge alike.
    """

    def __init__(self, settings: FaultSettings, path: Path | None = None) -> None:
        """`path`: the log of faults, on the rank that writes it."""
        self.settings = settings
        self.recent: list[float] = []
        self.in_a_row = 0
        self.skipped = 0
        self.rollbacks = 0
        self.overflows = 0
        """Steps of fp16 that were passed over while the loss scale fell."""
        self._overflows_in_a_row = 0
        self._path = path
        self._lines = 0

    def judge_loss(self, loss: float) -> str | None:
        """Why this loss should not be learned from, or None."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        s = self.settings
        if s.spike_sigma is None or len(self.recent) < s.window:
            return None
        mean = sum(self.recent) / len(self.recent)
        variance = sum((x - mean) ** 2 for x in self.recent) / len(self.recent)
        # A loss that hardly moves would make every wiggle a spike: at least 1 % of the mean.
        sigma = max(math.sqrt(variance), 0.01 * abs(mean))
        if loss > mean + s.spike_sigma * sigma:
            return (
                f"loss {loss:.4f} is {(loss - mean) / sigma:.1f} sigma above the last "
                f"{len(self.recent)} ({mean:.4f})"
            )
        return None

    def accept(self, loss: float) -> None:
        self.in_a_row = self._overflows_in_a_row = 0
        self.recent = [*self.recent, loss][-self.settings.window :]

    def skip(self, step: int, reason: str, ids: list[Any]) -> None:
        """Count a skipped step and write it down, with the ids of the global batch."""
        self.in_a_row += 1
        self.skipped += 1
        self._write({"step": step, "skipped": reason, "ids": ids})

    def overflow(self, step: int, loss_scale: float, ids: list[Any]) -> str | None:
        """Count a step whose gradient overflowed at `loss_scale`; why it is a fault, or None.

        What is no fault is written down here.
        """
        self._overflows_in_a_row += 1
        if self._overflows_in_a_row >= self.settings.overflows:
            return (
                f"gradient is not finite for {self._overflows_in_a_row} steps in a row, "
                f"loss scale {loss_scale:g}"
            )
        self.overflows += 1
        self._write({"step": step, "overflow_at_scale": loss_scale, "ids": ids})
        return None

    @property
    def must_roll_back(self) -> bool:
        return self.in_a_row >= self.settings.consecutive

    def roll_back(self, step: int, state: dict[str, Any]) -> None:
        """Note a rollback to a checkpoint's `state`; counts and log go on, the losses do not."""
        self.in_a_row = self._overflows_in_a_row = 0
        self.recent = list(state["recent"])
        self.rollbacks += 1
        self._write({"step": step, "rolled_back": self.rollbacks})

    @property
    def exhausted(self) -> bool:
        return self.rollbacks > self.settings.rollbacks

    def state(self) -> dict[str, Any]:
        return {
            "recent": self.recent,
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "overflows": self.overflows,
            "overflows_in_a_row": self._overflows_in_a_row,
            "lines": self._lines,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state and drop the lines that were written after it."""
        self.recent = list(state["recent"])
        self.in_a_row = state["in_a_row"]
        self.skipped = state["skipped"]
        self.rollbacks = state["rollbacks"]
        self.overflows = state.get("overflows", 0)  # checkpoints before there was a count
        self._overflows_in_a_row = state.get("overflows_in_a_row", 0)
        self.rewind(state["lines"])

    def rewind(self, lines: int) -> None:
        """Keep the first `lines` of the log."""
        self._lines = lines
        if self._path is None or not self._path.exists():
            return
        kept = self._path.read_text().splitlines(keepends=True)[:lines]
        if not kept:
            self._path.unlink()
            return
        write_whole(self._path, "".join(kept))

    def _write(self, record: dict[str, Any]) -> None:
        self._lines += 1
        if self._path is not None:
            with open(self._path, "a") as file:
                file.write(json.dumps(record) + "\n")
