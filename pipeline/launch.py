"""Running stages: one after another on this machine, each on one process or several ranks.

    run_pipeline   decides what is not fresh and runs it
    run_here       one stage in this process: lock → prepare → main → publish
    run_ranks      one stage on several local processes, each of which calls `run_here`

A rank knows itself by RANK and WORLD_SIZE (set by `run_ranks` or by the Slurm script).
Rank 0 locks, prepares and publishes; the others wait for its word and write no manifest.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from chainrule.pipeline import artifact, fence, slurm_job
from chainrule.pipeline.artifact import ATTEMPT, Artifact, partial_folder, read_json, write_json
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.graph import Pipeline, StageSpec, State
from chainrule.pipeline.stage import Stage, StageFailed, StageInterrupted
from chainrule.pipeline.tracking import Tracker

DONE, FAILED, WRONG_REQUEST, REQUEUE = 0, 1, 2, 75
"""Exit codes. 75 (EX_TEMPFAIL): state is saved, run me again."""
INTERRUPTED = 130
ATTEMPT_VARIABLE = "CHAINRULE_ATTEMPT"
PARENT_RUN_VARIABLE = "CHAINRULE_PARENT_RUN"
PREPARED_WITHIN_S = 120.0


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


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


# --- one stage -------------------------------------------------------------------------


def run_here(pipeline: Pipeline, name: str, rank: Rank | None = None) -> None:
    """Run one stage as this process's rank, and publish it from rank 0.

    Raises RequestError, StageFailed, StageInterrupted, or what the job raised.
    """
    rank = rank or Rank()
    spec = pipeline.stages[name]
    folder = pipeline.folder(name)
    attempt_id = os.environ.get(ATTEMPT_VARIABLE) or uuid.uuid4().hex
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
            _record_failure(stage, error)
        raise
    finally:
        if stage.is_main:
            _record_seconds(stage, time.monotonic() - began)
            if stage.tracker is not None:
                summary = stage.summary
                numbers = {k: float(v) for k, v in summary.items() if isinstance(v, int | float)}
                stage.tracker.metrics(_last_step(stage) + 1, numbers)
                stage.tracker.finish(status)
    if stage.is_main:
        _publish(pipeline, spec, stage)


def _prepare(pipeline: Pipeline, spec: StageSpec, attempt_id: str) -> dict[str, Any]:
    """Make or take up the unfinished folder; what was made under other settings is dropped."""
    folder = partial_folder(pipeline.folder(spec.name))
    fingerprint = pipeline.fingerprint(spec.name)
    attempt: dict[str, Any] = {"fingerprint": fingerprint, "attempts": 0, "seconds": 0.0}
    if (folder / ATTEMPT).is_file():
        earlier = read_json(folder / ATTEMPT)
        if earlier["fingerprint"] == fingerprint:
            attempt = earlier
        else:
            say(f"  {spec.name}: unfinished work under other settings is dropped")
    if attempt["attempts"] == 0 and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    attempt.setdefault("start", artifact.now())
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
        path = stage.folder / ATTEMPT
        if path.is_file():
            write_json(path, {**read_json(path), "mlflow_run_id": run_id})

    tags = {"chainrule.job": spec.job, "chainrule.fingerprint": stage.fingerprint}
    for role, artifacts in stage.inputs.items():
        runs = [str((a.manifest.get("mlflow") or {}).get("run_id")) for a in artifacts]
        tags[f"chainrule.input.{role}"] = ",".join(runs)
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT"):
        if name in os.environ:
            tags[f"slurm.{name.removeprefix('SLURM_').lower()}"] = os.environ[name]
    tracker = Tracker(
        pipeline.runs,
        pipeline.name,
        spec.name,
        run_id=attempt.get("mlflow_run_id"),
        parent_id=os.environ.get(PARENT_RUN_VARIABLE),
        tags=tags,
        on_run_id=keep,
    )
    tracker.parameters(_flat(spec.merged()))
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


def _record_seconds(stage: Stage, seconds: float) -> None:
    path = stage.folder / ATTEMPT
    attempt = read_json(path)
    write_json(path, {**attempt, "seconds": attempt["seconds"] + seconds})


def _record_failure(stage: Stage, error: Exception) -> None:
    path = stage.folder / ATTEMPT
    lines = str(error).splitlines() or [type(error).__name__]
    expected = isinstance(error, StageFailed | RequestError)
    shown = lines[0] if expected else f"{type(error).__name__}: {lines[0]}"
    failed = {"error": shown, "time": artifact.now(), "traceback": traceback.format_exc()}
    write_json(path, {**read_json(path), "failed": failed})


def _publish(pipeline: Pipeline, spec: StageSpec, stage: Stage) -> None:
    attempt = read_json(stage.folder / ATTEMPT)
    (stage.folder / "metrics.jsonl").touch()
    manifest = {
        "pipeline": pipeline.name,
        "stage": spec.name,
        "job": spec.job,
        "fingerprint": stage.fingerprint,
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
    artifact.publish(pipeline.folder(spec.name), manifest)


def _relative(found: Artifact, pipeline: Pipeline) -> str:
    try:
        return found.folder.relative_to(pipeline.root).as_posix()
    except ValueError:
        return str(found.folder)


# --- several ranks on this machine -------------------------------------------------------


def needs_ranks(spec: StageSpec) -> bool:
    """Whether the stage runs in processes of its own rather than in this one.

    More than one rank, or an engine that may abort the interpreter at its exit
    (`launch_apart` of the job says so).
    """
    ranks = max(spec.resources.processes, spec.resources.gpus)
    apart = getattr(spec.module, "launch_apart", None)
    return ranks > 1 or (apart is not None and apart(spec.config))


def stage_command(pipeline: Pipeline, name: str) -> list[str]:
    """The command that runs one stage as one rank."""
    command = [sys.executable, "-m", "chainrule.pipeline", "stage", str(pipeline.path), name]
    command += ["--runs", str(pipeline.runs)]
    for override in pipeline.overrides:
        command += ["--set", override]
    return command


def run_ranks(pipeline: Pipeline, name: str) -> None:
    """Start the stage's ranks here and wait; if one fails the others are ended.

    SIGTERM, SIGUSR1 and SIGINT are passed on to every rank. Raises as `run_here` does.
    """
    spec = pipeline.stages[name]
    world_size = max(spec.resources.processes, spec.resources.gpus)
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        ATTEMPT_VARIABLE: uuid.uuid4().hex,
        "CHAINRULE_PARENT_PID": str(os.getpid()),
    }
    environment.setdefault(
        "OMP_NUM_THREADS", str(spec.resources.cpus or max(1, _cores() // world_size))
    )
    ranks = []
    for rank in range(world_size):
        mine = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(stage_command(pipeline, name), env=mine))
    codes = _wait_for(ranks)
    if any(code == REQUEUE for code in codes):
        raise StageInterrupted(f"stage '{name}' saved its state and stopped")
    if any(codes):
        attempt_path = partial_folder(pipeline.folder(name)) / ATTEMPT
        error = "see the lines above"
        if attempt_path.is_file():
            error = read_json(attempt_path).get("failed", {}).get("error", error)
        bad = [f"rank {rank}: {_describe(code)}" for rank, code in enumerate(codes) if code]
        raise StageFailed(f"stage '{name}': {error} ({', '.join(bad)})")


def _describe(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(ranks: list[subprocess.Popen]) -> list[int]:
    """Exit codes of all ranks; the first bad one ends the rest after a grace of 10 s."""

    def forward(number: int, _frame: Any) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    passed_on = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, forward) for number in passed_on}
    ending: float | None = None
    try:
        while any(process.poll() is None for process in ranks):
            time.sleep(0.05)
            if ending is None and any(process.poll() for process in ranks):
                ending = time.monotonic()
            elif ending is not None and time.monotonic() - ending > 10:
                for process in ranks:
                    if process.poll() is None:
                        process.kill()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [process.returncode for process in ranks]


def die_with_parent() -> None:
    """A rank that `run_ranks` started ends when its launcher is killed (Linux)."""
    parent = os.environ.get("CHAINRULE_PARENT_PID")
    if parent is None or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        os._exit(FAILED)


# --- the pipeline ------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """Which stages are meant, and which are done again though fresh."""

    only: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    until: tuple[str, ...] = ()
    force: tuple[str, ...] = ()

    def stages(self, pipeline: Pipeline) -> list[str]:
        """Selected stages in running order; RequestError names one that does not exist."""
        from chainrule.pipeline.config import nearest

        for name in (*self.only, *self.start, *self.until, *self.force):
            if name not in pipeline.stages:
                raise RequestError(
                    f"{pipeline.path}: no stage '{name}'{nearest(name, list(pipeline.stages))}"
                )
        chosen = set(pipeline.stages)
        if self.only:
            chosen = set(self.only)
        if self.start:
            chosen &= set().union(*(pipeline.downstream(name) for name in self.start))
        if self.until:
            chosen &= set().union(*(pipeline.upstream(name) for name in self.until))
        chosen |= set(self.force)
        return [name for name in pipeline.stages if name in chosen]


@dataclass(frozen=True)
class Planned:
    """What will be done with a stage, and why."""

    name: str
    state: State
    reason: str
    runs: bool


def decide(pipeline: Pipeline, selection: Selection) -> list[Planned]:
    """For each selected stage whether it runs and why.

    RequestError where a stage would read an input that is neither fresh nor about to be made.
    """
    planned: list[Planned] = []
    made: set[str] = set()
    for name in selection.stages(pipeline):
        artifact.recover(pipeline.folder(name)) if not artifact.is_locked(
            pipeline.folder(name)
        ) else None
        state, reason = pipeline.state(name)
        if state is State.RUNNING:
            raise artifact.StageLocked(f"stage '{name}' is running: {reason}")
        forced = name in selection.force
        runs = forced or state is not State.FRESH
        if runs:
            for upstream in pipeline.stages[name].upstream():
                found, why = pipeline.state(upstream)
                if upstream not in made and found is not State.FRESH:
                    raise RequestError(
                        f"stage '{name}' needs '{upstream}', which is {found} ({why}); "
                        f"run it first or leave out --only/--from"
                    )
            made.add(name)
        planned.append(Planned(name, state, "asked for by --force" if forced else reason, runs))
    return planned


def run_pipeline(
    pipeline: Pipeline, selection: Selection, on_done: Callable[[Pipeline], None] | None = None
) -> int:
    """Run what is not fresh; the exit code. Every decision is said, with its reason."""
    planned = decide(pipeline, selection)
    todo = [plan for plan in planned if plan.runs]
    if not todo:
        say(f"{pipeline.name}: nothing to do, {len(planned)} stages are fresh")
        return DONE
    width = max(len(plan.name) for plan in planned)
    for plan in planned:
        what = "run " if plan.runs else "keep"
        say(f"{what} {plan.name:<{width}}  {plan.state}: {plan.reason}")
    parent = _PipelineRun(pipeline)
    status = "FAILED"
    try:
        for number, plan in enumerate(todo, 1):
            if plan.name in selection.force:
                _discard_unfinished(pipeline.folder(plan.name))
            began = time.monotonic()
            say(f"[{number}/{len(todo)}] {plan.name} ({pipeline.stages[plan.name].job})")
            if needs_ranks(pipeline.stages[plan.name]):
                run_ranks(pipeline, plan.name)
            else:
                run_here(pipeline, plan.name)
            metrics = _headline(Artifact.open(pipeline.folder(plan.name)).metrics)
            say(f"  {plan.name}: done in {time.monotonic() - began:.1f} s{metrics}")
        status = "FINISHED"
        if on_done is not None:
            on_done(pipeline)
            parent.file(pipeline.root / "report.html")
        return DONE
    except (StageInterrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        parent.finish(status)


def _discard_unfinished(folder: Path) -> None:
    with artifact.lock(folder):
        shutil.rmtree(partial_folder(folder), ignore_errors=True)


def _headline(metrics: dict[str, Any]) -> str:
    shown = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return f" ({', '.join(shown[:4])})" if shown else ""


class _PipelineRun:
    """The MLflow run of one pipeline run, parent of its stages' runs.

    A pipeline run that was cut off is taken up again by the next.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._path = pipeline.root / "pipeline.json"
        pipeline.root.mkdir(parents=True, exist_ok=True)
        earlier = read_json(self._path) if self._path.is_file() else {}
        run_id = earlier.get("mlflow_run_id") if not earlier.get("finished") else None
        run_id = run_id or None
        self._tracker = Tracker(
            pipeline.runs,
            pipeline.name,
            pipeline.name,
            run_id=run_id,
            tags={"chainrule.config": str(pipeline.path)},
            on_run_id=self._keep,
        )
        until = time.monotonic() + 15
        while self._tracker.run_id is None and time.monotonic() < until:
            time.sleep(0.05)
        if self._tracker.run_id is not None:
            os.environ[PARENT_RUN_VARIABLE] = self._tracker.run_id

    def _keep(self, run_id: str) -> None:
        write_json(self._path, {"mlflow_run_id": run_id, "finished": False})

    def file(self, path: Path) -> None:
        self._tracker.file(path)

    def finish(self, status: str) -> None:
        os.environ.pop(PARENT_RUN_VARIABLE, None)
        self._tracker.finish(status)
        if self._tracker.run_id is not None:
            write_json(
                self._path,
                {"mlflow_run_id": self._tracker.run_id, "finished": status == "FINISHED"},
            )
