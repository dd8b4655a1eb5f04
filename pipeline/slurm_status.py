"""`chainrule status` where stages run as Slurm jobs: what the artifacts say, and what Slurm says.

The queue tells of jobs that live; of ended ones `scontrol` and `sacct` where they still know
them, else the stage's own record (`.slurm/<stage>.attempts.jsonl` and its log).
"""

import shutil
from pathlib import Path
from typing import Any

from chainrule.pipeline import slurm
from chainrule.pipeline.graph import Pipeline
from chainrule.pipeline.slurm import Job
from chainrule.pipeline.slurm_job import attempts_of, slurm_folder
from chainrule.pipeline.submit import record_of

LOG_LINES = 4
UNSEEN = "0:53"
"""Exit code of a job whose node could not open its log: the script never ran."""


def add_jobs(pipeline: Pipeline, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `status.stage_rows` with each stage's job, and the state it implies."""
    if not slurm_folder(pipeline).is_dir():
        return rows
    records = {row["stage"]: record_of(pipeline, row["stage"]) for row in rows}
    ids = [record["job"] for record in records.values() if record]
    jobs = slurm.jobs_of(ids) if shutil.which("squeue") else {}
    return [_with_job(pipeline, row, records[row["stage"]], jobs) for row in rows]


def _with_job(
    pipeline: Pipeline, row: dict[str, Any], record: dict[str, Any] | None, jobs: dict[str, Job]
) -> dict[str, Any]:
    if record is None:
        return row
    job = jobs.get(record["job"])
    attempts = [a for a in attempts_of(pipeline, row["stage"]) if a["job"] == record["job"]]
    row = {
        **row,
        "job_id": record["job"],
        "log": record["log"],
        "nodes": (job.nodes if job else "") or (attempts[-1]["nodes"] if attempts else ""),
        "restarts": job.restarts if job else max((a["restart"] for a in attempts), default=0),
    }
    if job is not None:
        row["job_state"] = job.state.lower()
        row["elapsed"] = job.elapsed
    if row["state"] == "fresh" or record["fingerprint"] != row["fingerprint"]:
        return row
    if job is None:
        return {**row, "reason": f"job {record['job']} is gone from Slurm; {row['reason']}"}
    if job.state == "PENDING":
        return {**row, "state": "waiting", "reason": _why_waiting(pipeline, row["stage"], job)}
    if job.alive:
        return {**row, "state": "running", "reason": f"job {job.id} on {job.nodes}"}
    lines = log_tail(Path(record["log"]))
    state = "cancelled" if job.state == "CANCELLED" else "failed"
    return {**row, "state": state, "reason": _why_ended(pipeline, row, job), "log_tail": lines}


def _why_waiting(pipeline: Pipeline, stage: str, job: Job) -> str:
    if job.reason == "Dependency":
        return f"for {', '.join(pipeline.stages[stage].upstream())}"
    return f"for Slurm: {job.reason}"


def _why_ended(pipeline: Pipeline, row: dict[str, Any], job: Job) -> str:
    if job.exit_code == UNSEEN:
        return (
            f"node {job.nodes} could not write {row['log']}: it does not see the runs folder; "
            "submit with --runs on a filesystem that all nodes share"
        )
    if job.state == "CANCELLED" and job.reason in ("DependencyNeverSatisfied", "Dependency"):
        return f"could not start any more: an input failed ({_inputs(pipeline, row['stage'])})"
    if job.state == "COMPLETED":
        return f"job {job.id} ended without publishing the stage"
    said = row["reason"] if row["state"] == "failed" else ""
    return said or f"job {job.id}: {job.state.lower()}, exit {job.exit_code}, {job.reason}"


def _inputs(pipeline: Pipeline, stage: str) -> str:
    return ", ".join(pipeline.stages[stage].upstream())


def log_tail(path: Path, lines: int = LOG_LINES) -> list[str]:
    """The last lines of a job's log; what the script and srun say of the end itself is left out."""
    if not path.is_file():
        return []
    said = path.read_text(errors="replace").splitlines()
    noise = ("=== ", "srun: launch/slurm", "srun: Job step aborted", "slurmstepd")
    return [line for line in said if line.strip() and not line.startswith(noise)][-lines:]
