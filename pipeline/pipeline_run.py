"""The MLflow run of one pipeline run, parent of its stages' runs.

`runs/<pipeline>/pipeline.json` names it while it is open. A pipeline run that was cut off is
taken up again by the next; one whose stages were queued on Slurm is left open by `submit` and
ended by the last job.
"""

import os
import time
from pathlib import Path

from chainrule.pipeline.artifact import read_json, write_json
from chainrule.pipeline.graph import Pipeline
from chainrule.pipeline.tracking import Tracker

PARENT_RUN_VARIABLE = "CHAINRULE_PARENT_RUN"
OPENED_WITHIN_S = 15.0


def open_run(pipeline: Pipeline) -> str | None:
    """Id of the pipeline's MLflow run, where one is open."""
    path = _path(pipeline)
    found = read_json(path) if path.is_file() else {}
    return None if found.get("finished") else found.get("mlflow_run_id") or None


def _path(pipeline: Pipeline) -> Path:
    return pipeline.root / "pipeline.json"


class PipelineRun:
    """The open run, or a new one."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._path = _path(pipeline)
        pipeline.root.mkdir(parents=True, exist_ok=True)
        self._tracker = Tracker(
            pipeline.runs,
            pipeline.name,
            pipeline.name,
            run_id=open_run(pipeline),
            tags={"chainrule.config": str(pipeline.path)},
            on_run_id=self._keep,
        )

    def _keep(self, run_id: str) -> None:
        write_json(self._path, {"mlflow_run_id": run_id, "finished": False})

    def wait(self) -> str | None:
        """The run's id, once the store gave it; None where it did not in time."""
        until = time.monotonic() + OPENED_WITHIN_S
        while self._tracker.run_id is None and time.monotonic() < until:
            time.sleep(0.05)
        return self._tracker.run_id

    def begin(self) -> None:
        """Stages that this process runs, or starts as ranks, are nested under the run."""
        run_id = self.wait()
        if run_id is not None:
            os.environ[PARENT_RUN_VARIABLE] = run_id

    def file(self, path: Path) -> None:
        self._tracker.file(path)

    def leave_open(self) -> None:
        """End this process's part in it: others go on."""
        if self._tracker.run_id is not None:
            self._tracker.finish(None)

    def finish(self, status: str) -> None:
        os.environ.pop(PARENT_RUN_VARIABLE, None)
        self._tracker.finish(status)
        if self._tracker.run_id is not None:
            write_json(
                self._path,
                {"mlflow_run_id": self._tracker.run_id, "finished": status == "FINISHED"},
            )
