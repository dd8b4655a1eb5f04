"""`chainrule submit`: queue on Slurm what is not fresh, and remember what was queued.

    runs/<pipeline>/.slurm/<stage>.json            the last job of a stage, and its sbatch line
    runs/<pipeline>/.slurm/<stage>.attempts.jsonl  one line an attempt, written by the job
    runs/<pipeline>/.slurm/<stage>-<job>.log       what the job said, all attempts
    runs/<pipeline>/.slurm/configs/<hash>/x.yaml   the pipeline file as it was submitted
    runs/<pipeline>/.slurm/seen                    by which a job knows that it sees this folder

A stage waits for the jobs of its inputs (`afterok`); one whose input failed is cancelled by
Slurm (`--kill-on-invalid-dep`). A stage that is queued or running already is not queued again.
"""

import contextlib
import fcntl
import os
import re
import shlex
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from chainrule.pipeline import artifact, slurm
from chainrule.pipeline.artifact import write_json
from chainrule.pipeline.config import RequestError, Resources, digest
from chainrule.pipeline.graph import Pipeline, State
from chainrule.pipeline.launch import Selection, discard_unfinished
from chainrule.pipeline.pipeline_run import PipelineRun
from chainrule.pipeline.slurm import Job, Profile
from chainrule.pipeline.slurm_job import (
    RESTARTS_VARIABLE,
    SEEN,
    SEEN_VARIABLE,
    jobs_in,
    record_of,
    slurm_folder,
)


@dataclass
class Decision:
    """What `submit` does with one stage, and why."""

    stage: str
    reason: str
    line: list[str] | None = None
    """The sbatch command; None where nothing is queued."""
    arrays: list[list[str]] = field(default_factory=list)
    """Commands of the arrays that do the stage's parts before its own job gathers them."""
    job: str | None = None
    """The job that makes the stage: the one queued now, or before."""
    after: list[str] = field(default_factory=list)
    """Stages it waits for."""


def submit(
    pipeline: Pipeline,
    profile: Profile,
    selection: Selection | None = None,
    *,
    dry_run: bool = False,
) -> list[Decision]:
    """Queue every selected stage that is neither fresh nor queued; RequestError if one cannot be.

    Where Slurm refuses a job, those queued just before by this call are cancelled again.
    Stages asked for by `selection.force` begin anew: what an earlier attempt left is dropped.
    With `dry_run` nothing is written or queued.
    """
    names = (selection or Selection()).stages(pipeline)
    if dry_run:
        return _decide(pipeline, profile, names, selection, {})
    slurm.require_slurm()
    folder = slurm_folder(pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / "submit.lock"):
        records = {name: record_of(pipeline, name) for name in pipeline.stages}
        ids = [job for record in records.values() if record for job in jobs_in(record)]
        jobs = {job.id: job for job in slurm.jobs_of(ids).values() if job.alive}
        alive = {
            name: next(jobs[job] for job in jobs_in(record) if job in jobs)
            for name, record in records.items()
            if record and any(job in jobs for job in jobs_in(record))
        }
        decisions = _decide(pipeline, profile, names, selection, alive)
        _write_seen(folder)
        _write_config(pipeline)
        if any(decision.line is not None for decision in decisions):
            with _tracked_by(profile), _open_run(pipeline):
                _queue(pipeline, profile, decisions, selection.force if selection else ())
    return decisions


@contextlib.contextmanager
def _tracked_by(profile: Profile) -> Iterator[None]:
    """The MLflow server that the profile's jobs will write to."""
    wanted = profile.environment.get("MLFLOW_TRACKING_URI") or profile.mlflow
    before = os.environ.get("MLFLOW_TRACKING_URI")
    if wanted is not None:
        os.environ["MLFLOW_TRACKING_URI"] = wanted
    try:
        yield
    finally:
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before
        elif wanted is not None:
            del os.environ["MLFLOW_TRACKING_URI"]


@contextlib.contextmanager
def _open_run(pipeline: Pipeline) -> Iterator[None]:
    """The MLflow run under which the jobs put their stages' runs; the last job ends it."""
    run = PipelineRun(pipeline)
    run.wait()
    try:
        yield
    except BaseException:
        run.finish("FAILED")
        raise
    run.leave_open()


def _decide(
    pipeline: Pipeline,
    profile: Profile,
    names: list[str],
    selection: Selection | None,
    alive: dict[str, Job],
) -> list[Decision]:
    decisions: list[Decision] = []
    waiting = {name: job.id for name, job in alive.items()}
    forced = selection.force if selection else ()
    for name in names:
        state, reason = pipeline.state(name)
        if name in alive:
            _require_same_settings(pipeline, name, alive[name])
            said = f"{alive[name].state.lower()} as job {alive[name].id}"
            decisions.append(Decision(name, said, job=alive[name].id))
            continue
        if state is State.FRESH and name not in forced:
            decisions.append(Decision(name, f"fresh: {reason}"))
            continue
        if state is State.RUNNING:
            raise artifact.StageLocked(f"stage '{name}' is running, not as a job: {reason}")
        after = _inputs_to_wait_for(pipeline, name, waiting)
        why = "asked for by --force" if name in forced else f"{state}: {reason}"
        decision = Decision(name, why, after=after)
        jobs = [waiting[source] for source in after]
        if pipeline.stages[name].resources.array is not None:
            decision.arrays = array_lines(pipeline, name, profile, jobs)
            jobs = [_variable(name, i) for i in range(len(decision.arrays))]
        decision.line = stage_line(pipeline, name, profile, jobs)
        waiting[name] = _variable(name)  # its id, once it is queued
        decisions.append(decision)
    pipeline.check(found.stage for found in decisions if found.line is not None)
    return decisions


def _variable(stage: str, array: int | None = None) -> str:
    """Stands for the id of a job that is not queued yet."""
    return f"${{{stage}}}" if array is None else f"${{{stage}_array_{array}}}"


def array_lines(
    pipeline: Pipeline, name: str, profile: Profile, after: list[str]
) -> list[list[str]]:
    """The `sbatch` commands of a stage's parts: several arrays past the site's limit of one.

    With a limit on tasks at once, each array waits for the one before: the limit is of all.
    """
    spec = pipeline.stages[name]
    parts = spec.resources.array or 1
    if not hasattr(spec.module, "part"):
        raise RequestError(
            f"stage '{name}': job {spec.job} cannot be cut into an array; leave resources.array out"
        )
    size = profile.array_size or (slurm.array_size_of_site() if slurm.is_here() else parts)
    limit = spec.resources.array_limit or profile.array_limit
    lines = []
    for number, first in enumerate(range(0, parts, size)):
        tasks = min(size, parts - first)
        at_once = f"%{limit}" if limit is not None else ""
        before = [_variable(name, number - 1)] if limit is not None and number else []
        environment = {"CHAINRULE_PARTS": str(parts), "CHAINRULE_PART_OFFSET": str(first)}
        array = f"0-{tasks - 1}{at_once}"
        lines.append(stage_line(pipeline, name, profile, [*after, *before], array, environment))
    return lines


def _require_same_settings(pipeline: Pipeline, name: str, job: Job) -> None:
    record = record_of(pipeline, name) or {}
    if record.get("fingerprint") != pipeline.fingerprint(name):
        raise RequestError(
            f"stage '{name}' is {job.state.lower()} as job {job.id} under other settings; "
            f"let it end, or scancel {job.id} first"
        )


def _inputs_to_wait_for(pipeline: Pipeline, name: str, waiting: dict[str, str]) -> list[str]:
    after = []
    for source in dict.fromkeys(pipeline.stages[name].upstream()):
        if source in waiting:
            after.append(source)
            continue
        state, reason = pipeline.state(source)
        if state is not State.FRESH:
            raise RequestError(
                f"stage '{name}' needs '{source}', which is {state} ({reason}) and not queued; "
                "submit it too: leave out --only/--from"
            )
    return after


def stage_line(
    pipeline: Pipeline,
    name: str,
    profile: Profile,
    after: list[str],
    array: str | None = None,
    environment: dict[str, str] | None = None,
) -> list[str]:
    """The exact `sbatch` command of a stage that waits for the jobs `after`."""
    spec = pipeline.stages[name]
    scripts = slurm.scripts_folder()
    own = scripts / f"{spec.job}.sbatch"
    script = own if own.is_file() else scripts / "stage.sbatch"
    folder = slurm_folder(pipeline)
    arguments = [str(_config_copy(pipeline)), name, "--runs", str(pipeline.runs.absolute())]
    for override in pipeline.overrides:
        arguments += ["--set", override]
    return slurm.sbatch_line(
        script,
        arguments,
        spec.resources,
        profile.of(spec.job),
        name=f"{pipeline.name}.{name}",
        folder=Path.cwd(),
        log=folder / (f"{name}-%A_%a.log" if array else f"{name}-%j.log"),
        signal_before_s=profile.signal_before_s,
        environment=_environment(pipeline, profile) | (environment or {}),
        after=after,
        array=array,
    )


def report_line(pipeline: Pipeline, profile: Profile, after: list[str]) -> list[str]:
    """The `sbatch` command that writes the report once the jobs `after` have ended."""
    folder = slurm_folder(pipeline)
    arguments = [str(_config_copy(pipeline)), "--runs", str(pipeline.runs.absolute())]
    for override in pipeline.overrides:
        arguments += ["--set", override]
    line = slurm.sbatch_line(
        slurm.scripts_folder() / "report.sbatch",
        arguments,
        Resources(),
        profile.of("report").model_copy(update={"time": None, "cpus": None, "memory": None}),
        name=f"{pipeline.name}.report",
        folder=Path.cwd(),
        log=folder / "report-%j.log",
        signal_before_s=profile.signal_before_s,
        environment=_environment(pipeline, profile),
    )
    at = next(i for i, word in enumerate(line) if word.startswith("--export="))
    return [*line[:at], f"--dependency=afterany:{':'.join(after)}", *line[at:]]


def _environment(pipeline: Pipeline, profile: Profile) -> dict[str, str]:
    values = {
        "CHAINRULE_HOME": str(slurm.scripts_folder().parent),
        SEEN_VARIABLE: str(slurm_folder(pipeline) / SEEN),
        RESTARTS_VARIABLE: str(profile.restarts_without_progress),
    }
    if profile.hang_after_s is not None:
        values["CHAINRULE_HANG_AFTER_S"] = str(profile.hang_after_s)
    if profile.scratch is not None:
        values["CHAINRULE_SCRATCH"] = profile.scratch
    if profile.mlflow is not None:
        values["MLFLOW_TRACKING_URI"] = profile.mlflow
    values |= profile.environment
    for key, value in values.items():
        if "," in value:
            raise RequestError(f"{key}={value}: sbatch --export cannot carry a comma; see env.sh")
    return values


def _queue(
    pipeline: Pipeline, profile: Profile, decisions: list[Decision], forced: tuple[str, ...]
) -> None:
    """Queue what was decided, and a last job that writes the report; all of it or nothing."""
    ids: dict[str, str] = {d.stage: d.job for d in decisions if d.job is not None}
    queued: list[str] = []
    try:
        for decision in decisions:
            if decision.line is None:
                continue
            if decision.stage in forced:
                discard_unfinished(pipeline.folder(decision.stage))
            arrays: list[str] = []
            for number, array in enumerate(decision.arrays):
                arrays.append(slurm.submit_line(_filled(array, ids)))
                queued.append(arrays[-1])
                ids[f"{decision.stage}_array_{number}"] = arrays[-1]
            decision.line = _filled(decision.line, ids)
            job = slurm.submit_line(decision.line)
            queued.append(job)
            ids[decision.stage] = decision.job = job
            record = {
                "stage": decision.stage,
                "job": job,
                "arrays": arrays,
                "parts": pipeline.stages[decision.stage].resources.array,
                "fingerprint": pipeline.fingerprint(decision.stage),
                "log": str(slurm_folder(pipeline) / f"{decision.stage}-{job}.log"),
                "submitted": artifact.now(),
                "host": socket.gethostname(),
                "line": decision.line,
            }
            write_json(slurm_folder(pipeline) / f"{decision.stage}.json", record)
        if queued:
            slurm.submit_line(report_line(pipeline, profile, queued))
    except RequestError:
        if queued:
            slurm.cancel(queued)
        raise


def _filled(line: list[str], ids: dict[str, str]) -> list[str]:
    """The command with the ids of the jobs it waits for."""
    words = []
    for word in line:
        if word.startswith("--dependency="):
            for variable, job in ids.items():
                word = word.replace(f"${{{variable}}}", job)
        words.append(word)
    return words


def shell(decision: Decision) -> list[str]:
    """The commands of a decision as lines of shell that keep the jobs' ids in variables."""
    names = [f"{decision.stage}_array_{i}" for i in range(len(decision.arrays))]
    lines = dict(zip(names, decision.arrays, strict=True))
    if decision.line is not None:
        lines[decision.stage] = decision.line
    return [f"{_shell_name(name)}=$({_quoted(line)})" for name, line in lines.items()]


def _shell_name(name: str) -> str:
    """A stage's name as the name of a variable: no hyphens, no digit in front."""
    name = name.replace("-", "_")
    return f"_{name}" if name[0].isdigit() else name


def _quoted(line: list[str]) -> str:
    return " ".join(
        '"' + re.sub(r"\$\{([^}]+)\}", lambda found: f"${{{_shell_name(found[1])}}}", word) + '"'
        if word.startswith("--dependency=")
        else shlex.quote(word)
        for word in line
    )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One submission at a time: the second waits and then finds everything queued."""
    with open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _config_copy(pipeline: Pipeline) -> Path:
    """Where the pipeline file as submitted is kept: jobs must not see later edits."""
    content = pipeline.path.read_text()
    return slurm_folder(pipeline) / "configs" / digest(content)[:12] / pipeline.path.name


def _write_config(pipeline: Pipeline) -> None:
    copy = _config_copy(pipeline)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(pipeline.path.read_text())


def _write_seen(folder: Path) -> None:
    if not (folder / SEEN).is_file():
        (folder / SEEN).write_text(uuid.uuid4().hex + "\n")
