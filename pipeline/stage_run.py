"""One stage, on one rank: lock → prepare → main → publish.

A rank knows itself by RANK and WORLD_SIZE (set by `ranks.run_ranks` or by the Slurm script).
Rank 0 locks, prepares and publishes; the others wait for its word and write no manifest.
"""

import os
import shutil
import socket
import subprocess
import threading
import time
import traceback
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from chainrule.pipeline import artifact, fence, slurm_job
from chainrule.pipeline.artifact import ATTEMPT, Artifact, partial_folder, read_json, write_json
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.graph import Pipeline, StageSpec
from chainrule.pipeline.model_registry import register
from chainrule.pipeline.pipeline_run import PARENT_RUN_VARIABLE, open_run
from chainrule.pipeline.stage import Stage, StageFailed, StageInterrupted, say
from chainrule.pipeline.tracking import Tracker, end_abandoned

ATTEMPT_VARIABLE = "CHAINRULE_ATTEMPT"
OF_THE_ATTEMPT = (ATTEMPT, "config.yaml", "metrics.jsonl")
"""What an unfinished folder holds before anything was made in it."""
PREPARED_WITHIN_S = 120.0
_NOTING = threading.Lock()


def code_version() -> dict[str, str | None]:
    """The package's version, and the commit where it runs from a checkout."""
    top = Path(__file__).resolve().parents[1]
    commit = None
    if (top / ".git").exists():
        done = subprocess.run(
            ["git", "-C", str(top), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=False,
        )
        commit = done.stdout.strip() or None
    return {"version": metadata.version("chainrule"), "commit": commit}


@dataclass(frozen=True)
class Rank:
    """Which of how many processes this one is."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Rank":
        """RANK and WORLD_SIZE, else what srun says, else a single process."""
        env = os.environ
        if "RANK" in env:
            return cls(int(env["RANK"]), int(env.get("WORLD_SIZE", "1")))
        if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
            return cls(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]))
        return cls()


def run_here(pipeline: Pipeline, name: str, rank: Rank | None = None) -> None:
    """Run one stage as this process's rank, and publish it from rank 0.

    Raises RequestError, StageFailed, StageInterrupted, or what the job raised.
    """
    rank = rank or Rank()
    spec = pipeline.stages[name]
    folder = pipeline.folder(name)
    attempt_id = _attempt_id(rank)
    with ExitStack() as stack:
        if rank.rank == 0:
            slurm_job.note_attempt(pipeline, name)
            stack.enter_context(fence.hold(folder))
            artifact.recover(folder)
            attempt = _prepare(pipeline, spec, attempt_id)
        else:
            attempt = _wait_for_prepare(folder, attempt_id)
            stack.enter_context(fence.watched(folder))
        stage = Stage(
            name=name,
            pipeline=pipeline.name,
            job=spec.job,
            folder=partial_folder(folder),
            fingerprint=attempt["fingerprint"],
            inputs=_open_inputs(pipeline, spec),
            rank=rank.rank,
            world_size=rank.world_size,
            resumed=attempt["attempts"] > 1,
        )
        if rank.rank == 0:
            stage.tracker = _tracker(pipeline, spec, stage, attempt)
        _attempt(pipeline, spec, stage, attempt)


def _attempt_id(rank: Rank) -> str:
    """What tells the ranks of one start from those of another. RequestError where several were
    started without it: each would wait for ever for the others."""
    given = os.environ.get(ATTEMPT_VARIABLE)
    if not given and rank.world_size > 1:
        raise RequestError(
            f"rank {rank.rank} of {rank.world_size}: {ATTEMPT_VARIABLE} is not set; give all ranks "
            "of one start the same word, of another start another one"
        )
    return given or uuid.uuid4().hex


def run_part(pipeline: Pipeline, name: str, part: int, parts: int) -> None:
    """Run part `part` of `parts` of a stage in its unfinished folder, beside other parts.

    The stage itself, run afterwards, finds what the parts left and publishes. RequestError
    where the job cannot be parted.
    """
    spec = pipeline.stages[name]
    if not hasattr(spec.module, "part"):
        raise RequestError(f"stage '{name}': job {spec.job} cannot be cut into parts")
    folder = pipeline.folder(name)
    with ExitStack() as stack:
        slurm_job.note_attempt(pipeline, name)
        stack.enter_context(fence.hold(folder.with_name(f"{name}.part-{part}")))
        with fence.lock_within(folder, PREPARED_WITHIN_S):
            attempt = _join(pipeline, spec)
        stage = Stage(
            name=name,
            pipeline=pipeline.name,
            job=spec.job,
            folder=partial_folder(folder),
            fingerprint=attempt["fingerprint"],
            inputs=_open_inputs(pipeline, spec),
            rank=part,
            world_size=parts,
            resumed=True,
        )
        try:
            spec.module.part(spec.config, stage, part, parts)
        except RequestError as error:  # once a stage has begun, it is the stage that fails
            raise StageFailed(str(error)) from error


def _join(pipeline: Pipeline, spec: StageSpec) -> dict[str, Any]:
    """The attempt that other parts began, or a new one."""
    path = partial_folder(pipeline.folder(spec.name)) / ATTEMPT
    if path.is_file():
        attempt: dict[str, Any] = read_json(path)
        if attempt["fingerprint"] == pipeline.fingerprint(spec.name):
            return attempt
    return _prepare(pipeline, spec, uuid.uuid4().hex)


def _attempt(pipeline: Pipeline, spec: StageSpec, stage: Stage, attempt: dict[str, Any]) -> None:
    began = time.monotonic()
    status = "KILLED"
    try:
        spec.module.main(spec.config, stage)
        status = "FINISHED"
    except StageInterrupted:
        raise
    except KeyboardInterrupt:
        raise
    except Exception as error:
        status = "FAILED"
        if stage.is_main:
            shown = _record_failure(stage, error)
            if stage.tracker is not None:
                stage.tracker.tags({"chainrule.last_failure": shown})
        if isinstance(error, RequestError):  # once a stage has begun, it is the stage that fails
            raise StageFailed(str(error)) from error
        raise
    finally:
        if stage.is_main:
            _note(stage, seconds=time.monotonic() - began)
            if stage.tracker is not None:
                summary = stage.summary
                numbers = {k: float(v) for k, v in summary.items() if isinstance(v, int | float)}
                # At the last step: what is a series as well and has that step is not sent again.
                stage.tracker.metrics(_last_step(stage), numbers)
                stage.tracker.finish(status)
    if stage.is_main:
        _publish(pipeline, spec, stage)


def _prepare(pipeline: Pipeline, spec: StageSpec, attempt_id: str) -> dict[str, Any]:
    """Make or take up the unfinished folder; what was made under other settings is put aside."""
    folder = partial_folder(pipeline.folder(spec.name))
    fingerprint = pipeline.fingerprint(spec.name)
    attempt: dict[str, Any] = {"fingerprint": fingerprint, "attempts": 0, "seconds": 0.0}
    _change_places(pipeline, spec.name, fingerprint)
    if (folder / ATTEMPT).is_file():
        earlier = read_json(folder / ATTEMPT)
        if earlier["fingerprint"] == fingerprint:
            attempt = earlier
    if attempt["attempts"] == 0 and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    attempt.setdefault("start", artifact.now())
    attempt.setdefault("request", pipeline.request(spec.name))
    attempt.pop("failed", None)
    attempt |= {
        "attempts": attempt["attempts"] + 1,
        "attempt_id": attempt_id,
        "host": socket.gethostname(),
    }
    merged = yaml.safe_dump(spec.merged(), sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(merged)
    write_json(folder / ATTEMPT, attempt)
    return attempt


def _change_places(pipeline: Pipeline, name: str, fingerprint: str) -> None:
    """Put unfinished work under other settings aside, and take up again what was begun under
    these. A setting that is tried, or mistyped, costs no training; one such folder is kept."""
    folder = pipeline.folder(name)
    partial = partial_folder(folder)
    if (partial / ATTEMPT).is_file():
        attempt = read_json(partial / ATTEMPT)
        earlier = attempt["fingerprint"]
        if earlier == fingerprint:
            return
        end_abandoned(pipeline.runs, attempt.get("mlflow_run_id"))
        if any(path.name not in OF_THE_ATTEMPT for path in partial.iterdir()):
            aside = artifact.aside_folder(folder, earlier)
            for older in artifact.asides(folder):
                if older != artifact.aside_folder(folder, fingerprint):
                    shutil.rmtree(older)
                    say(f"  {name}: {older.name}, put aside before, is removed")
            partial.replace(aside)
            say(f"  {name}: unfinished work under other settings is put aside: {aside.name}")
    begun = artifact.aside_folder(folder, fingerprint)
    if begun.is_dir():
        if partial.exists():
            shutil.rmtree(partial)
        begun.replace(partial)
        say(f"  {name}: goes on with what was put aside for these settings")


def _wait_for_prepare(folder: Path, attempt_id: str) -> dict[str, Any]:
    path = partial_folder(folder) / ATTEMPT
    until = time.monotonic() + PREPARED_WITHIN_S
    while time.monotonic() < until:
        if path.is_file():
            attempt = read_json(path)
            if attempt.get("attempt_id") == attempt_id:
                return attempt
        time.sleep(0.1)
    raise StageFailed(
        f"{path}: rank 0 did not prepare it within {PREPARED_WITHIN_S:.0f} s; "
        "is the runs folder on a filesystem that all nodes see?"
    )


def _open_inputs(pipeline: Pipeline, spec: StageSpec) -> dict[str, list[Artifact]]:
    inputs: dict[str, list[Artifact]] = {}
    for role, names in spec.inputs.items():
        inputs[role] = []
        for name in names:
            found = Artifact.open(pipeline.folder(name))
            artifact.require_same(
                f"input {role} of stage '{spec.name}'",
                pipeline.fingerprint(name),
                "the pipeline file",
                found.fingerprint,
                str(found.folder),
            )
            inputs[role].append(found)
    return inputs


def _tracker(pipeline: Pipeline, spec: StageSpec, stage: Stage, attempt: dict[str, Any]) -> Tracker:
    def keep(run_id: str) -> None:
        attempt["mlflow_run_id"] = run_id
        if (stage.folder / ATTEMPT).is_file():  # gone where a slow store answers after the end
            _note(stage, mlflow_run_id=run_id)

    tags = {"chainrule.job": spec.job, "chainrule.fingerprint": stage.fingerprint}
    for role, artifacts in stage.inputs.items():
        runs = [str((a.manifest.get("mlflow") or {}).get("run_id")) for a in artifacts]
        tags[f"chainrule.input.{role}"] = ",".join(runs)
    tracker = Tracker(
        pipeline.runs,
        pipeline.name,
        spec.name,
        run_id=attempt.get("mlflow_run_id"),
        parent_id=os.environ.get(PARENT_RUN_VARIABLE) or open_run(pipeline),
        tags=tags,
        on_run_id=keep,
        log=stage.folder / "metrics.jsonl" if stage.resumed else None,
    )
    tracker.parameters(_flat(spec.merged()))
    if of_job := slurm_job.tags(pipeline, spec.name):
        tracker.tags(of_job)  # a resumed run too gets the job that it goes on in
    return tracker


def _flat(value: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        dotted = f"{path}.{key}" if path else str(key)
        if isinstance(item, dict):
            flat.update(_flat(item, dotted))
        else:
            flat[dotted] = item
    return flat


def _last_step(stage: Stage) -> int:
    path = stage.folder / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = path.read_text().splitlines()
    return int(yaml.safe_load(lines[-1])["step"]) if lines else 0


def _note(stage: Stage, seconds: float = 0.0, **entries: Any) -> None:
    """Add to what is known of the attempt; from any thread of the process that holds the stage.

    The tracking store gives its run id on a thread of its own, at any time.
    """
    path = stage.folder / ATTEMPT
    with _NOTING:
        attempt = read_json(path)
        write_json(path, {**attempt, **entries, "seconds": attempt["seconds"] + seconds})


def _record_failure(stage: Stage, error: Exception) -> str:
    """Write down why the stage failed; that in one line."""
    lines = str(error).splitlines() or [type(error).__name__]
    expected = isinstance(error, StageFailed | RequestError)
    shown = lines[0] if expected else f"{type(error).__name__}: {lines[0]}"
    failed = {"error": shown, "time": artifact.now(), "traceback": traceback.format_exc()}
    _note(stage, failed=failed)
    return shown


def _publish(pipeline: Pipeline, spec: StageSpec, stage: Stage) -> None:
    attempt = read_json(stage.folder / ATTEMPT)
    (stage.folder / "metrics.jsonl").touch()
    manifest = {
        "pipeline": pipeline.name,
        "stage": spec.name,
        "job": spec.job,
        "fingerprint": stage.fingerprint,
        "request": attempt["request"],
        "inputs": {
            role: [
                {"stage": a.name, "fingerprint": a.fingerprint, "path": _relative(a, pipeline)}
                for a in artifacts
            ]
            for role, artifacts in stage.inputs.items()
        },
        "code": code_version(),
        "metrics": stage.summary,
        "mlflow": {"run_id": attempt.get("mlflow_run_id")},
        "host": attempt["host"],
        "start": attempt["start"],
        "end": artifact.now(),
        "seconds": round(attempt["seconds"], 3),
        "attempts": attempt["attempts"],
    }
    folder = pipeline.folder(spec.name)
    artifact.publish(folder, manifest)
    if spec.job == "handoff" and attempt.get("mlflow_run_id"):
        register(pipeline.runs, pipeline.name, spec.name, folder, attempt["mlflow_run_id"])


def _relative(found: Artifact, pipeline: Pipeline) -> str:
    try:
        return found.folder.relative_to(pipeline.root).as_posix()
    except ValueError:
        return str(found.folder)
