"""What a stage does because it runs as a Slurm job: it sees the folder, notes its attempts."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from chainrule.pipeline import artifact
from chainrule.pipeline.artifact import ATTEMPT, partial_folder
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.graph import Pipeline, State
from chainrule.pipeline.slurm_log import LOG_VARIABLE, reason_of_restart
from chainrule.pipeline.stage import StageFailed

FOLDER = ".slurm"
SEEN = "seen"
SEEN_VARIABLE = "CHAINRULE_SEEN"
RESTARTS_VARIABLE = "CHAINRULE_RESTARTS_WITHOUT_PROGRESS"


def slurm_folder(pipeline: Pipeline) -> Path:
    return pipeline.root.absolute() / FOLDER


def record_of(pipeline: Pipeline, stage: str) -> dict[str, Any] | None:
    """What `submit` wrote when it last queued the stage."""
    path = slurm_folder(pipeline) / f"{stage}.json"
    return artifact.read_json(path) if path.is_file() else None


def jobs_in(record: dict[str, Any]) -> list[str]:
    """Ids of the jobs of a stage's record: its own, then its arrays'."""
    return [record["job"], *record["arrays"]]


def restarted() -> bool:
    """Whether this is a later attempt of a job that Slurm started before."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def is_published(pipeline: Pipeline, stage: str) -> bool:
    """Whether an earlier attempt brought the stage to its end (a forced one was fresh before)."""
    unfinished = partial_folder(pipeline.folder(stage)) / ATTEMPT
    return pipeline.state(stage)[0] is State.FRESH and not unfinished.is_file()


def require_seen() -> None:
    """RequestError where this node does not see the runs folder that `submit` wrote to."""
    given = os.environ.get(SEEN_VARIABLE)
    if given is not None and not Path(given).is_file():
        raise RequestError(
            f"node {socket.gethostname()} does not see the runs folder {Path(given).parents[1]}; "
            "submit with --runs on a filesystem that all nodes share"
        )


def note_attempt(pipeline: Pipeline, stage: str) -> None:
    """Write down that a job begins an attempt at a stage, why, and how far it finds it.

    StageFailed where the job was restarted too often without getting any further.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or "SLURM_STEP_ID" not in os.environ:
        return
    if os.environ.get("SLURM_PROCID", "0") != "0":  # one line an attempt, not one a rank
        return
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    path = slurm_folder(pipeline) / f"{stage}.attempts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = {
        "job": job,
        "array": os.environ.get("SLURM_ARRAY_JOB_ID"),
        "restart": restart,
        "reason": _why_started(pipeline, stage, restart),
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


def _why_started(pipeline: Pipeline, stage: str, restart: int) -> str | None:
    """Why there is a further attempt at the stage; None for the first, and for other parts."""
    if restart:
        log = os.environ.get(LOG_VARIABLE)
        return (reason_of_restart(Path(log), restart - 1) if log else None) or "not known"
    mine = {os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID", "")}
    record = record_of(pipeline, stage)
    if record and mine & {*jobs_in(record)}:
        mine |= {*jobs_in(record)}
    unfinished = partial_folder(pipeline.folder(stage)) / ATTEMPT
    before = [a for a in attempts_of(pipeline, stage) if not mine & {a["job"], a.get("array")}]
    if not before or not unfinished.is_file():
        return None
    attempt = artifact.read_json(unfinished)
    if attempt["fingerprint"] != pipeline.fingerprint(stage):
        return None
    failed = attempt.get("failed")
    return f"submitted again after: {failed['error']}" if failed else "submitted again"


def tags(pipeline: Pipeline, stage: str) -> dict[str, str]:
    """What the stage's MLflow run says of its job: ids, nodes, restarts and their reasons."""
    found = {
        f"slurm.{name.removeprefix('SLURM_').lower()}": os.environ[name]
        for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")
        if name in os.environ
    }
    begun = [attempt for attempt in attempts_of(pipeline, stage) if attempt.get("reason")]
    if found and begun:
        found["slurm.restart_reason"] = begun[-1]["reason"]
        said = [f"{a['job']}.{a['restart']} on {a['nodes']}: {a['reason']}" for a in begun]
        found["slurm.restart_reasons"] = "\n".join(said)
    return found


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
