"""What moves with the step besides weights, and how a run begins, goes back and stops."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chainrule.pipeline.artifact import require_same
from chainrule.pipeline.data.batches import Mixture
from chainrule.pipeline.data.ledger import Ledger, rewind, write_header
from chainrule.pipeline.stage import Stage, StageFailed
from chainrule.pipeline.training.checkpoints import Checkpoint
from chainrule.pipeline.training.engine import Engine
from chainrule.pipeline.training.faults import FaultMonitor


class RunState:
    """Counters of a run; all of them are in each checkpoint."""

    def __init__(self, model: str) -> None:
        """`model`: digest of the model's config."""
        self.model = model
        self.step = 0
        self.position = 0
        """Rows of the global order consumed or passed over."""
        self.tokens_seen = 0
        self.best_step: int | None = None
        self.best_loss: float | None = None
        self.final: dict[str, float] = {}
        """Figures of the last validation."""
        self.pending: dict[str, Any] | None = None
        """What is to be logged of this step once its validation, which was cut off, is made."""
        self.saved_step: int | None = None
        """Step of the checkpoint that is on disk, if this is its state."""

    def state(self) -> dict[str, Any]:
        counters = ("model", "step", "position", "tokens_seen")
        kept = (*counters, "best_step", "best_loss", "final", "pending")
        return {name: getattr(self, name) for name in kept}

    def restore(self, checkpoint: Checkpoint) -> None:
        """LineageError where the checkpoint is of another model."""
        found = checkpoint.state["model"]
        remedy = f"remove {checkpoint.folder.parent}, or ask for the model that it is of"
        where = str(checkpoint.folder)
        require_same("models", found, where, self.model, "what the settings ask", remedy)
        for name in self.state():
            setattr(self, name, checkpoint.state[name])
        self.saved_step = self.step

    def note_best(self, loss: float) -> None:
        """The loss of a validation at a step that is saved."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss = self.step, loss


def begin(
    checkpoint: Checkpoint | None, run: RunState, engine: Engine, monitor: FaultMonitor
) -> None:
    """Take up a checkpoint, or begin at step 0."""
    if checkpoint is None:
        monitor.rewind(0)
        return
    run.restore(checkpoint)
    engine.restore(checkpoint)
    monitor.restore(checkpoint.state["faults"])


def roll_back(folder: Path, run: RunState, engine: Engine, monitor: FaultMonitor) -> int:
    """Back to the last good checkpoint, but on with the data; the rows passed over.

    StageFailed where there is no checkpoint, or after too many rollbacks.
    """
    step, position = run.step, run.position
    checkpoint = engine.newest(folder)
    found = f"{monitor.in_a_row} faults of learning in a row at step {step} (see faults.jsonl)"
    if checkpoint is None:
        raise StageFailed(f"{found}, and no checkpoint yet: lower the learning rate or warm up")
    run.restore(checkpoint)
    engine.restore(checkpoint)
    monitor.roll_back(step, checkpoint.state["faults"])
    if monitor.exhausted:
        raise StageFailed(
            f"{found}, after {monitor.settings.rollbacks} rollbacks: lower the learning rate, or "
            f"look at the samples named there; step {run.step} is intact"
        )
    passed_over = position - run.position
    run.position = position
    run.saved_step = None
    return passed_over


class LedgerKeeper:
    """This rank's ledger, rewound where the run goes back; nothing where none is asked for."""

    def __init__(self, stage: Stage, engine: Engine, drawn: Mixture, wanted: bool) -> None:
        self._folder = stage.folder / "ledger"
        self._stage, self._engine, self._drawn = stage, engine, drawn
        self._wanted = wanted
        self._ledger: Ledger | None = None
        if wanted and stage.is_main:
            write_header(self._folder, drawn)

    def begin_at(self, step: int, position: int, passed_over: int = 0) -> None:
        """Drop what steps >= `step` recorded. Collective."""
        if not self._wanted:
            return
        self.close()
        self._engine.barrier()
        if self._stage.is_main:
            rewind(self._folder, step)
        self._engine.barrier()
        self._ledger = Ledger(self._folder, self._stage.rank)
        if passed_over and self._stage.is_main:
            first = position - passed_over
            self._ledger.pass_over(self._drawn, first, passed_over, step)

    def record(self, batch: Any) -> None:
        if self._ledger is not None:
            self._ledger.record(batch)

    def sync(self) -> None:
        """Before a checkpoint: what it stands on outlives a loss of power, too."""
        if self._ledger is not None:
            self._ledger.sync()

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None


class StopSignals:
    """Whether SIGTERM, SIGUSR1 or a first Ctrl-C came."""

    requested = False
    since = 0.0


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Turn SIGTERM, SIGUSR1 and Ctrl-C into a wish that the loop reads, for a while. A second
    Ctrl-C does not wait for it. A wish that came after the loop had looked for the last time is
    passed on, as the signal that it was, to whoever hears it outside."""
    stop = StopSignals()
    came: list[int] = []

    def note(number: int, _frame: Any) -> None:
        now = time.monotonic()
        if not stop.requested:
            stop.requested, stop.since = True, now
            came.append(number)
        elif number == signal.SIGINT and now - stop.since > 1:
            # (Within a second it is the first one again, passed on by a launcher.)
            raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {n: signal.signal(n, note) for n in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:  # and nothing was raised for it
        signal.raise_signal(came[0])
