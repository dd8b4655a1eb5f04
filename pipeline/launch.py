"""Running a pipeline on this machine: decide what is not fresh, run it, say why."""

import contextlib
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainrule.pipeline import artifact
from chainrule.pipeline.artifact import Artifact, partial_folder
from chainrule.pipeline.config import RequestError, nearest
from chainrule.pipeline.destinations import refused, require_folder_place
from chainrule.pipeline.graph import Pipeline, StageSpec, State
from chainrule.pipeline.pipeline_run import PipelineRun
from chainrule.pipeline.ranks import needs_ranks, run_ranks
from chainrule.pipeline.stage import DONE, FAILED, StageFailed, StageInterrupted, say
from chainrule.pipeline.stage_run import run_here
from chainrule.pipeline.tracking import end_abandoned


@dataclass(frozen=True)
class Selection:
    """Which stages are meant, and which are done again though fresh."""

    only: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    until: tuple[str, ...] = ()
    force: tuple[str, ...] = ()

    def stages(self, pipeline: Pipeline) -> list[str]:
        """Selected stages in running order; RequestError names one that does not exist."""
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

    RequestError where a stage would read an input that is neither fresh nor about to be made,
    or where a stage could only fail when its turn comes.
    """
    planned: list[Planned] = []
    made: set[str] = set()
    for name in selection.stages(pipeline):
        if not artifact.is_locked(pipeline.folder(name)):
            artifact.recover(pipeline.folder(name))
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
    pipeline.check(plan.name for plan in planned if plan.runs)
    return planned


def run_pipeline(
    pipeline: Pipeline,
    selection: Selection,
    on_done: Callable[[Pipeline], None] | None = None,
    keep_going: bool = False,
) -> int:
    """Run what is not fresh; the exit code. Every decision is said, with its reason.

    With `keep_going` a stage that failed, of whatever, ends only those that hang on it.
    """
    pipeline.root.mkdir(parents=True, exist_ok=True)  # hashes of source files are kept there
    planned = decide(pipeline, selection)
    todo = [plan for plan in planned if plan.runs]
    if not todo:
        say(f"{pipeline.name}: nothing to do, {len(planned)} stages are fresh")
        return DONE
    require_folder_place(pipeline.root / todo[0].name, "--runs")
    width = max(len(plan.name) for plan in planned)
    for plan in planned:
        what = "run " if plan.runs else "keep"
        say(f"{what} {plan.name:<{width}}  {plan.state}: {plan.reason}")
    parent = PipelineRun(pipeline)
    parent.begin()
    status = "FAILED"
    failed: dict[str, str] = {}
    try:
        for number, plan in enumerate(todo, 1):
            spec = pipeline.stages[plan.name]
            lacking = [name for name in spec.upstream() if name in failed]
            if lacking:
                failed[plan.name] = f"needs {lacking[0]}"
                continue
            say(f"[{number}/{len(todo)}] {plan.name} ({spec.job})")
            try:
                _run_one(pipeline, plan.name, begin_anew=plan.name in selection.force)
            except StageFailed as error:
                if not keep_going:
                    raise
                say(f"error: {error}")
                failed[plan.name] = str(error).splitlines()[0]
            except (RequestError, StageInterrupted):
                raise
            except Exception as error:
                if not keep_going:
                    raise
                traceback.print_exc()
                failed[plan.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                say(f"error: {failed[plan.name]}")
        if not failed:
            status = "FINISHED"
        if on_done is not None:
            on_done(pipeline)
            parent.file(pipeline.root / "report.html")
        for name, why in failed.items():
            say(f"not done: {name}: {why}")
        return FAILED if failed else DONE
    except (StageInterrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        parent.finish(status)


def _run_one(pipeline: Pipeline, name: str, begin_anew: bool) -> None:
    if begin_anew:
        discard_unfinished(pipeline.folder(name))
    began = time.monotonic()
    _say_what_is_missing(pipeline.stages[name])
    if needs_ranks(pipeline.stages[name]):
        run_ranks(pipeline, name)
    else:
        with failing(name):
            run_here(pipeline, name)
    metrics = _headline(Artifact.open(pipeline.folder(name)).metrics)
    say(f"  {name}: done in {time.monotonic() - began:.1f} s{metrics}")


def _say_what_is_missing(spec: StageSpec) -> None:
    """GPUs are asked of a cluster; here the stage goes on with what there is."""
    if not spec.resources.gpus:
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == 0:
        say(f"  {spec.name}: resources.gpus {spec.resources.gpus}: no GPU here; it uses the CPU")
    elif found < spec.resources.gpus:
        raise StageFailed(
            f"stage '{spec.name}': resources.gpus {spec.resources.gpus}: there are {found} here; "
            f"set --set {spec.name}.resources.gpus={found}"
        )


@contextlib.contextmanager
def failing(name: str) -> Iterator[None]:
    """What the system refuses a stage at work, its disk full say, fails that stage: StageFailed.

    The traceback is in the `attempt.json` of the stage's unfinished folder.
    """
    try:
        yield
    except OSError as error:
        said = refused(error)
        if said is None:
            raise
        raise StageFailed(f"stage '{name}': {said}") from error


def discard_unfinished(folder: Path) -> None:
    """Drop what an earlier attempt left; StageLocked where somebody is at work on it."""
    partial = partial_folder(folder)
    run_id = None
    with artifact.lock(folder):
        if (partial / artifact.ATTEMPT).is_file():
            # An altered one is no reason to keep it.
            with contextlib.suppress(artifact.ArtifactError):
                run_id = artifact.read_json(partial / artifact.ATTEMPT).get("mlflow_run_id")
        for left in (partial, *artifact.asides(folder)):
            shutil.rmtree(left, ignore_errors=True)
    end_abandoned(folder.parents[1], run_id)


def _headline(metrics: dict[str, Any]) -> str:
    shown = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return f" ({', '.join(shown[:4])})" if shown else ""
