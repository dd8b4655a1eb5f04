"""What a stage does because it runs as a Slurm job: it sees the folder, notes its attempts."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from chainrule.pipeline import artifact
from chainrule.pipeline.artifact import ATTEMPT, partial_folder
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.graph import Pipeline
from chainrule.pipeline.stage import StageFailed

FOLDER = ".slurm"
SEEN = "seen"
SEEN_VARIABLE = "CHAINRULE_SEEN"
RESTARTS_VARIABLE = "CHAINRULE_RESTARTS_WITHOUT_PROGRESS"


def slurm_folder(pipeline: Pipeline) -> Path:
    return pipeline.root.absolute() / FOLDER


def restarted() -> bool:
    """Whether this is a later attempt of a job that Slurm started before."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def require_seen() -> None:
    """RequestError where this node does not see the runs folder that `submit` wrote to."""
    given = os.environ.get(SEEN_VARIABLE)
    if given is not None and not Path(given).is_file():
        raise RequestError(
            f"node {socket.gethostname()} does not see the runs folder {Path(given).parents[1]}; "
            "submit with --runs on a filesystem that all nodes share"
        )


def note_attempt(pipeline: Pipeline, stage: str) -> None:
    """Write down that a job begins an attempt at a stage, and how far it finds it.

    StageFailed where the job was restarted too often without getting any further.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or "SLURM_STEP_ID" not in os.environ:
        return
    path = slurm_folder(pipeline) / f"{stage}.attempts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = {
        "job": job,
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        "start": artifact.now(),
        "progress": progress_of(partial_folder(pipeline.folder(stage))),
    }
    with open(path, "a") as file:
        file.write(json.dumps(mine) + "\n")
    bound = int(os.environ.get(RESTARTS_VARIABLE, "5"))
    stuck = 0
    for attempt in reversed([a for a in attempts_of(pipeline, stage) if a["job"] == job]):
        if attempt["progress"] != mine["progress"]:
            break
        stuck += 1
    if stuck > bound:
        raise StageFailed(
            f"stage '{stage}': {bound} restarts brought it no further than {mine['progress']}; "
            "not started again: see the log above for what ends it"
        )


def attempts_of(pipeline: Pipeline, stage: str) -> list[dict[str, Any]]:
    """The attempts that jobs noted, oldest first."""
    path = slurm_folder(pipeline) / f"{stage}.attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def progress_of(partial: Path) -> str:
    """How far an unfinished stage is: its last checkpoint, else how many files it has."""
    latest = partial / "checkpoints" / "latest"
    if latest.is_file():
        return latest.read_text().strip()
    temporary = (ATTEMPT, "config.yaml", "metrics.jsonl")
    files = [p for p in partial.rglob("*") if p.is_file() and p.name not in temporary]
    return f"{len(files)} files"
