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
from chainrule.pipeline.slurm_job import attempts_of, jobs_in, record_of, slurm_folder
from chainrule.pipeline.slurm_log import exit_code, reason_of_restart, tail

LOG_LINES = 4
UNSEEN = "0:53"
"""Exit code of a job whose node could not open its log: the script never ran."""
INPUT_FAILED = "could not start any more: an input failed"


def add_jobs(pipeline: Pipeline, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `status.stage_rows` with each stage's job, and the state it implies."""
    if not slurm_folder(pipeline).is_dir():
        return rows
    records = {row["stage"]: record_of(pipeline, row["stage"]) for row in rows}
    ids = [job for record in records.values() if record for job in jobs_in(record)]
    jobs = slurm.jobs_of(ids) if shutil.which("squeue") else {}
    found = [_with_job(pipeline, row, records[row["stage"]], jobs) for row in rows]
    return [_with_failed_inputs(pipeline, row, found) for row in found]


def _with_job(
    pipeline: Pipeline, row: dict[str, Any], record: dict[str, Any] | None, jobs: dict[str, Job]
) -> dict[str, Any]:
    if record is None:
        return row
    job = jobs.get(record["job"])
    mine = jobs_in(record)
    attempts = [
        a for a in attempts_of(pipeline, row["stage"]) if {a["job"], a.get("array")} & {*mine}
    ]
    own = [a for a in attempts if a["job"] == record["job"]]
    restarts = [a for a in attempts if a["restart"]]
    row = {
        **row,
        "job_id": record["job"],
        "log": record["log"],
        "nodes": (job.nodes if job else "") or (own[-1]["nodes"] if own else ""),
        "restarts": job.restarts if job else max((a["restart"] for a in own), default=0),
    }
    if job is not None:
        row["job_state"] = job.state.lower()
        row["elapsed"] = job.elapsed
    if len(mine) > 1:
        row["restarts"] = max(row["restarts"], len(restarts))
    why = _why_restarted(job, restarts, Path(record["log"]))
    if why is not None and row["restarts"]:
        row["restart_reason"] = why
    if row["state"] == "fresh" or record["fingerprint"] != row["fingerprint"]:
        return row
    arrays = [jobs[array] for array in record["arrays"] if array in jobs]
    if (of_array := _array_row(record, arrays, job)) is not None:
        return {**row, **of_array}
    if job is None:
        return {**row, **_own_record(row, record)}
    if job.state == "PENDING":
        reason = _why_waiting(pipeline, row["stage"], job, row.get("restart_reason"))
        return {**row, "state": "waiting", "reason": reason}
    if job.alive:
        said = f"job {job.id} on {job.nodes}"
        if "restart_reason" in row:
            said += f", restarted after: {row['restart_reason']}"
        return {**row, "state": "running", "reason": said}
    lines = log_tail(Path(record["log"]))
    state = "cancelled" if job.state == "CANCELLED" else "failed"
    return {**row, "state": state, "reason": _why_ended(row, job), "log_tail": lines}


def _own_record(row: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What the log tells of a job that Slurm no longer knows."""
    log = Path(record["log"])
    gone = f"job {record['job']} is gone from Slurm"
    if not log.is_file():
        return {"state": "cancelled", "reason": f"{gone} and never started"}
    code = exit_code(log)
    if not code:  # it did not live to say how it ended
        return {"reason": f"{gone}; {row['reason']}", "log_tail": log_tail(log)}
    said = row["reason"] if row["state"] == "failed" else f"exit {code}"
    return {"state": "failed", "reason": f"{gone}; {said}", "log_tail": log_tail(log)}


def _why_restarted(job: Job | None, restarts: list[dict[str, Any]], log: Path) -> str | None:
    """Why the job was started again last: as its attempts noted, or, before one could, its log."""
    noted = restarts[-1] if restarts else None
    if job is not None and (noted is None or noted["restart"] < job.restarts):
        said = reason_of_restart(log, job.restarts - 1) if job.restarts else None
        if said is not None:
            return said
    return noted["reason"] if noted else None


def _array_row(
    record: dict[str, Any], arrays: list[Job], gathering: Job | None
) -> dict[str, Any] | None:
    """What a stage's arrays say of it while its own job has nothing to do yet; else None."""
    if any(array.alive and array.state != "PENDING" for array in arrays):
        done = sum(array.tasks.get("COMPLETED", 0) for array in arrays)
        running = sum(array.tasks.get("RUNNING", 0) for array in arrays)
        nodes = ",".join(dict.fromkeys(array.nodes for array in arrays if array.nodes))
        said = f"{done} of {record['parts']} parts done, {running} running"
        elapsed = next(array.elapsed for array in arrays if array.alive)
        return {"state": "running", "reason": said, "nodes": nodes, "elapsed": elapsed}
    broken = next((array for array in arrays if array.failed_task is not None), None)
    if broken is None or (gathering is not None and gathering.alive):
        return None
    log = Path(record["log"]).with_name(f"{record['stage']}-{broken.failed_task}.log")
    state = "cancelled" if broken.state == "CANCELLED" else "failed"
    said = f"part {broken.failed_task}: {broken.state.lower()}, exit {broken.exit_code}"
    return {"state": state, "reason": said, "log": str(log), "log_tail": log_tail(log)}


def _why_waiting(pipeline: Pipeline, stage: str, job: Job, restarted_after: str | None) -> str:
    if restarted_after is not None:
        return f"to go on after: {restarted_after}"
    if job.reason == "Dependency":
        return f"for {', '.join(pipeline.stages[stage].upstream()) or 'another job'}"
    return f"for Slurm: {job.reason}"


def _why_ended(row: dict[str, Any], job: Job) -> str:
    if job.exit_code == UNSEEN:
        return (
            f"node {job.nodes} could not write {row['log']}: it does not see the runs folder; "
            "submit with --runs on a filesystem that all nodes share"
        )
    if job.state == "CANCELLED" and job.reason in ("DependencyNeverSatisfied", "Dependency"):
        return INPUT_FAILED
    if job.state == "COMPLETED":
        return f"job {job.id} ended without publishing the stage"
    said = row["reason"] if row["state"] == "failed" else ""
    return said or f"job {job.id}: {job.state.lower()}, exit {job.exit_code}, {job.reason}"


def _with_failed_inputs(
    pipeline: Pipeline, row: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The row of a stage that could not start, with which of its inputs are to blame."""
    if row["reason"] != INPUT_FAILED:
        return row
    inputs = pipeline.stages[row["stage"]].upstream()
    blamed = [r["stage"] for r in rows if r["stage"] in inputs and r["state"] != "fresh"]
    return {**row, "reason": f"{INPUT_FAILED} ({', '.join(blamed or inputs)})"}


def log_tail(path: Path, lines: int = LOG_LINES) -> list[str]:
    """The last lines of a job's log; what the script and srun say of the end itself is left out."""
    said = (tail(path) or "").splitlines()
    noise = ("=== ", "srun: launch/slurm", "srun: Job step aborted", "slurmstepd")
    return [line for line in said if line.strip() and not line.startswith(noise)][-lines:]
