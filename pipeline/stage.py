"""What a job sees of the pipeline while it runs: its folder, inputs, metrics, progress.

A job is `main(config, stage)`. It writes in `stage.folder`, which survives a kill, and
finds there what an earlier attempt left. It logs through the stage and never prints.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainrule.pipeline.artifact import Artifact, ArtifactError
from chainrule.pipeline.heartbeat import beat
from chainrule.pipeline.progress import Progress
from chainrule.pipeline.whole_file import write_whole

if TYPE_CHECKING:
    from chainrule.pipeline.tracking import Tracker


DONE, FAILED, WRONG_REQUEST, REQUEUE = 0, 1, 2, 75
"""Exit codes. 75 (EX_TEMPFAIL): state is saved, run me again."""
INTERRUPTED = 130


class StageFailed(Exception):
    """A stage cannot go on (exit code 1): one or two lines naming what, where, remedy."""


class StageInterrupted(Exception):
    """The stage saved its state after a signal and asks to be requeued (exit code 75)."""


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def for_json(scalars: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with a string for what JSON has no number for (nan, inf)."""
    return {
        key: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in scalars.items()
    }


@dataclass(frozen=True)
class Input:
    """One input role of a job."""

    jobs: tuple[str, ...]
    """Jobs whose artifacts may fill the role."""
    many: bool = False
    optional: bool = False


@dataclass
class Stage:
    """A stage at work, on one rank."""

    name: str
    pipeline: str
    job: str
    folder: Path
    fingerprint: str
    inputs: Mapping[str, list[Artifact]] = field(default_factory=dict)
    rank: int = 0
    world_size: int = 1
    resumed: bool = False
    """Whether an earlier attempt left work in `folder`."""
    tracker: "Tracker | None" = None
    summary: dict[str, Any] = field(default_factory=dict)
    """Final metrics: into artifact.json and MLflow. Flat; numbers, strings or short lists."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics_path = self.folder / "metrics.jsonl"
        if self.rank == 0:
            self._drop_torn_line()

    @property
    def is_main(self) -> bool:
        """Rank 0 writes shared files, metrics and progress."""
        return self.rank == 0

    def input(self, role: str) -> Artifact:
        """The one artifact of a role; ArtifactError where there is none."""
        found = self.inputs.get(role, [])
        if len(found) != 1:
            raise ArtifactError(f"stage '{self.name}': input '{role}' has {len(found)} artifacts")
        return found[0]

    def optional(self, role: str) -> Artifact | None:
        found = self.inputs.get(role, [])
        return found[0] if found else None

    def log(self, step: int, **scalars: float | int | str) -> None:
        """One line of `metrics.jsonl`, and MLflow's metrics at `step`. Rank 0 only."""
        beat()
        if not self.is_main:
            return
        with open(self._metrics_path, "a") as file:
            file.write(json.dumps({"step": step, **for_json(scalars)}) + "\n")
        if self.tracker is not None:
            numbers = {k: float(v) for k, v in scalars.items() if isinstance(v, int | float)}
            self.tracker.metrics(step, numbers)

    def rewind_log(self, step: int) -> None:
        """Drop the lines of `metrics.jsonl` past `step`: they will be made again."""
        if not self.is_main or not self._metrics_path.exists():
            return
        kept = [
            line
            for line in self._metrics_path.read_text().splitlines(keepends=True)
            if json.loads(line)["step"] <= step
        ]
        write_whole(self._metrics_path, "".join(kept))

    def _drop_torn_line(self) -> None:
        if not self._metrics_path.exists():
            return
        text = self._metrics_path.read_text()
        if text and not text.endswith("\n"):
            self._metrics_path.write_text(text[: text.rfind("\n") + 1])

    def picture(self, path: Path) -> None:
        """A picture (or page) of the artifact, put into MLflow as well."""
        if self.is_main and self.tracker is not None:
            self.tracker.file(path)

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Facts settled only at run time (parameter count, vocabulary), into MLflow."""
        if self.is_main and self.tracker is not None:
            self.tracker.parameters(values)

    def progress(self, total: int | None, unit: str, start: int = 0) -> Progress:
        """A bar on a terminal, a line now and then elsewhere; silent on ranks above 0."""
        return Progress(self.name, total, unit, start, silent=not self.is_main)
