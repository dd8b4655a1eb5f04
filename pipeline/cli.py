"""The command line. Exit codes: 0 done, 1 a stage failed, 2 the request was wrong, 75 run again.

A file that the system refuses is one line too; CHAINRULE_TRACEBACK=1 shows where it was met.

Commands import what they need when they are called: `chainrule status` reads artifacts
and must not wait for torch or MLflow.
"""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from chainrule.pipeline import heartbeat, launch, ranks, slurm_job, stage_run
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.destinations import refused
from chainrule.pipeline.model_registry import resolve
from chainrule.pipeline.stage import (
    DONE,
    FAILED,
    INTERRUPTED,
    REQUEUE,
    WRONG_REQUEST,
    StageFailed,
    StageInterrupted,
    say,
)

app = typer.Typer(
    name="chainrule",
    help="Pretrain autoregressive models of image, text and audio tokens, stage by stage.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

WATCH_EVERY_S = 2.0
TRACEBACK_VARIABLE = "CHAINRULE_TRACEBACK"
UsageError: Any = typer.BadParameter.__mro__[1]
"""click's UsageError; typer carries a click of its own in newer versions."""

ConfigArgument = Annotated[
    Path, typer.Argument(help="A pipeline file (.yaml), or the name of one that is shipped.")
]
RunsOption = Annotated[
    Path | None, typer.Option("--runs", help="Where artifacts lie (default: runs).")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=V", help="Override a setting: STAGE.KEY.SUBKEY=VALUE."),
]

AcceptOption = Annotated[
    bool,
    typer.Option(
        "--accept-collapsed",
        help="Encode with a collapsed codebook: accept_collapsed of each pretokenize stage.",
    ),
]


def model_folders(given: Any) -> Any:
    """What an argument or option names as a model, or as several, or not at all, as folders."""
    if isinstance(given, list | tuple):
        return [resolve(one) for one in given]
    return None if given is None else resolve(given)


ModelArgument = Annotated[
    Path,
    typer.Argument(
        callback=model_folders,
        help="A handed-off model: its folder, PIPELINE/STAGE, or models:/NAME@ALIAS of MLflow.",
    ),
]


def _version() -> str:
    """That of the installed package; in a checkout that is not installed, its pyproject's."""
    import tomllib
    from importlib import metadata

    try:
        return metadata.version("chainrule")
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return str(tomllib.loads(project.read_text())["project"]["version"])


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"chainrule {_version()}")
        raise typer.Exit(DONE)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """What stands before a command."""


@app.command()
def run(
    config: ConfigArgument,
    only: Annotated[list[str] | None, typer.Option(help="Just this stage.")] = None,
    start: Annotated[
        list[str] | None, typer.Option("--from", help="This stage and those that hang on it.")
    ] = None,
    until: Annotated[
        list[str] | None, typer.Option(help="This stage and those that it hangs on.")
    ] = None,
    force: Annotated[
        list[str] | None, typer.Option(help="Do this stage again though it is fresh.")
    ] = None,
    overrides: SetOption = None,
    runs: RunsOption = None,
    accept_collapsed: AcceptOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run and print the merged config.")
    ] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="A failed stage ends only those that hang on it.")
    ] = False,
) -> None:
    """Run what is not fresh, and say why."""
    pipeline = _load(config, overrides, runs, accept_collapsed)
    selection = launch.Selection(
        tuple(only or ()), tuple(start or ()), tuple(until or ()), tuple(force or ())
    )
    if dry_run:
        for plan in launch.decide(pipeline, selection):
            what = "run " if plan.runs else "keep"
            say(f"{what} {plan.name}  {plan.state}: {plan.reason}")
        _print_yaml(pipeline)
        return
    try:
        code = launch.run_pipeline(pipeline, selection, _write_report, keep_going)
    except KeyboardInterrupt:
        say(f"{pipeline.root}: what was done is kept; the same command goes on from there")
        raise
    raise typer.Exit(code)


def _load(
    config: Path, overrides: list[str] | None, runs: Path | None, accept_collapsed: bool
) -> Any:
    """The pipeline; with `accept_collapsed` as if that were set for each pretokenize stage."""
    from chainrule.pipeline.pipeline_file import load_pipeline

    pipeline = load_pipeline(config, overrides, runs)
    if not accept_collapsed:
        return pipeline
    encoding = [name for name, spec in pipeline.stages.items() if spec.job == "pretokenize"]
    if not encoding:
        raise RequestError(f"--accept-collapsed: {config} has no pretokenize stage; leave it out")
    accepted = [f"{name}.accept_collapsed=true" for name in encoding]
    return load_pipeline(config, [*(overrides or []), *accepted], runs)


def _write_report(pipeline: Any) -> None:
    from chainrule.pipeline.report import write_report

    say(f"report: {write_report(pipeline.root)}")


def _print_yaml(pipeline: Any) -> None:
    import yaml

    stages = {name: spec.merged() for name, spec in pipeline.stages.items()}
    merged = {"name": pipeline.name, "runs": str(pipeline.runs), "stages": stages}
    sys.stdout.write(yaml.safe_dump(merged, sort_keys=False, allow_unicode=True))


@app.command()
def stage(
    config: ConfigArgument,
    name: Annotated[str, typer.Argument(help="The stage.")],
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Just part I of N (an array task): 0/8.")
    ] = None,
    overrides: SetOption = None,
    runs: RunsOption = None,
) -> None:
    """Run one stage as one rank, also where it is fresh; used by scripts.

    RANK and WORLD_SIZE, or srun's variables, say which rank of how many; with several,
    CHAINRULE_ATTEMPT is a word that all ranks of one start share.
    """
    from chainrule.pipeline.pipeline_file import load_pipeline

    ranks.die_with_parent()
    slurm_job.require_seen()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a job that can save more sets its own
        signal.signal(number, _interrupt_stage)
    heartbeat.watch_if_asked(REQUEUE)
    pipeline = load_pipeline(config, overrides, runs)
    launch.Selection(only=(name,)).stages(pipeline)
    if slurm_job.restarted() and slurm_job.is_published(pipeline, name):
        say(f"{name}: the attempt before published it; nothing is left to do")
        return
    rank = stage_run.Rank.from_environment()
    if part is not None:  # a task of several ranks: each takes its share of the part
        task, tasks = _part(part)
        mine, parts = task * rank.world_size + rank.rank, tasks * rank.world_size
        with launch.failing(name):
            stage_run.run_part(pipeline, name, mine, parts)
        return
    with launch.failing(name):
        stage_run.run_here(pipeline, name, rank)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise RequestError(f"--part {text}: write it as I/N with I from 0 to N-1")
    return int(part), int(parts)


def _interrupt_stage(number: int, frame: Any) -> None:
    raise StageInterrupted(f"{signal.Signals(number).name}: what is whole is kept")


@app.command()
def submit(
    config: ConfigArgument,
    profile: Annotated[
        str | None, typer.Option(help="A cluster: a name under slurm/profiles/, or a YAML file.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Just this stage.")] = None,
    start: Annotated[
        list[str] | None, typer.Option("--from", help="This stage and those that hang on it.")
    ] = None,
    until: Annotated[
        list[str] | None, typer.Option(help="This stage and those that it hangs on.")
    ] = None,
    force: Annotated[
        list[str] | None, typer.Option(help="Do this stage again though it is fresh.")
    ] = None,
    overrides: SetOption = None,
    runs: RunsOption = None,
    accept_collapsed: AcceptOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the exact sbatch lines and queue nothing.")
    ] = False,
) -> None:
    """Queue on Slurm what is not fresh, in order, and return."""
    from chainrule.pipeline import slurm
    from chainrule.pipeline.catalogue import stage_jobs
    from chainrule.pipeline.submit import shell, submit as queue

    pipeline = _load(config, overrides, runs, accept_collapsed)
    cluster = slurm.load_profile(profile, stage_jobs())
    selection = launch.Selection(
        tuple(only or ()), tuple(start or ()), tuple(until or ()), tuple(force or ())
    )
    for decision in queue(pipeline, cluster, selection, dry_run=dry_run):
        if decision.line is None:
            say(f"keep  {decision.stage}  {decision.reason}")
        elif dry_run:
            say(f"queue {decision.stage}  {decision.reason}")
            typer.echo("\n".join(shell(decision)))
        else:
            after = f", after {', '.join(decision.after)}" if decision.after else ""
            say(f"queue {decision.stage}  {decision.reason}: job {decision.job}{after}")


@app.command()
def status(
    config: ConfigArgument,
    overrides: SetOption = None,
    runs: RunsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow until nothing runs or waits any more.")
    ] = False,
) -> None:
    """The state of each stage and why, with its Slurm job where it has one."""
    from chainrule.pipeline.pipeline_file import load_pipeline
    from chainrule.pipeline.slurm_status import add_jobs
    from chainrule.pipeline.status import is_settled, stage_rows, table

    pipeline = load_pipeline(config, overrides, runs)
    rows = add_jobs(pipeline, stage_rows(pipeline))
    while watch and not is_settled(rows):
        clear = "\033[H\033[2J" if sys.stdout.isatty() else ""
        typer.echo(f"{clear}{table(rows)}\n")
        time.sleep(WATCH_EVERY_S)
        rows = add_jobs(pipeline, stage_rows(pipeline))
    if as_json:
        stages = {row["stage"]: row for row in rows}
        typer.echo(json.dumps({"pipeline": pipeline.name, "stages": stages}, indent=1))
    else:
        typer.echo(table(rows))


@app.command()
def plan(
    config: ConfigArgument,
    utilisation: Annotated[
        float, typer.Option(help="Share of the peak FLOP/s that the training is taken to reach.")
    ] = 0.4,
    gpu: Annotated[
        str | None, typer.Option(help="For stages with gpus and no gpu_type: h100, a100, …")
    ] = None,
    calibrate: Annotated[
        int, typer.Option(min=0, help="Make so many real steps of each training here.")
    ] = 0,
    overrides: SetOption = None,
    runs: RunsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """What it will take: parameters, memory, FLOPs, hours, disk; what does not fit."""
    from chainrule.pipeline.pipeline_file import load_pipeline
    from chainrule.pipeline.plan import plan as plan_of
    from chainrule.pipeline.plan_text import text

    pipeline = load_pipeline(config, overrides, runs)
    plans = plan_of(pipeline, utilisation, gpu, calibrate)
    if as_json:
        stages = {found["stage"]: found for found in plans}
        typer.echo(json.dumps({"pipeline": pipeline.name, "stages": stages}, indent=1))
    else:
        typer.echo(text(plans))


@app.command()
def report(
    config: ConfigArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page to write.")] = None,
    end_run: Annotated[
        bool,
        typer.Option(
            "--end-run", help="Put it on the pipeline's MLflow run, and end that if all has ended."
        ),
    ] = False,
    overrides: SetOption = None,
    runs: RunsOption = None,
) -> None:
    """Write one self-contained report.html of a pipeline's runs."""
    from chainrule.pipeline.pipeline_file import load_pipeline
    from chainrule.pipeline.report import write_report

    pipeline = load_pipeline(config, overrides, runs)
    if not pipeline.root.is_dir():
        raise RequestError(f"{pipeline.root}: nothing was run yet; chainrule run {config}")
    page = write_report(pipeline.root, out)
    typer.echo(page)
    if end_run:
        _end_run(pipeline, page)


def _end_run(pipeline: Any, page: Path) -> None:
    """What the last job of a submission does with the MLflow run that `submit` left open."""
    from chainrule.pipeline.pipeline_run import PipelineRun, open_run
    from chainrule.pipeline.slurm_status import add_jobs
    from chainrule.pipeline.status import is_settled, stage_rows

    if open_run(pipeline) is None:
        return
    rows = add_jobs(pipeline, stage_rows(pipeline))
    tracked = PipelineRun(pipeline)
    tracked.wait()
    tracked.file(page)
    if not is_settled(rows):
        tracked.leave_open()  # another submission's jobs: their last one ends it
    else:
        tracked.finish("FINISHED" if all(row["state"] == "fresh" for row in rows) else "FAILED")


@app.command()
def schema() -> None:
    """Print the JSON schema of pipeline files, for editors that complete YAML."""
    from chainrule.pipeline.catalogue import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


@app.command()
def ui(
    runs: Annotated[Path, typer.Option("--runs", help="Where artifacts lie.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Open MLflow's pages on the tracking store of a runs folder."""
    from chainrule.pipeline.tracking import tracking_uri

    uri = tracking_uri(runs)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise RequestError(f"{runs}: no mlflow.db there; run a pipeline first or give --runs")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--port", str(port), "--workers", "1"]
    os.execv(sys.executable, command)


def main() -> None:
    """Entry point: errors of the user's making become one or two lines and an exit code."""
    # OpenMP threads that spin long while they wait take the core from the ones they wait for as
    # soon as the machine has other work (30 times as slow on two busy cores); threads that do
    # not spin at all halve the speed of small models on quiet ones. Read when torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    code = _main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing is left to do, and engines may abort the interpreter while it is torn down.
    os._exit(code)


def _interrupted() -> int:
    say("interrupted")  # whoever keeps what was done has said so
    return INTERRUPTED


def _main() -> int:
    def on_terminate(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, on_terminate)
    try:
        try:
            for module in ("cli_model", "cli_bench"):  # they add their commands to `app`
                importlib.import_module(f"chainrule.pipeline.{module}")
            result = app(standalone_mode=False)
        finally:  # from here on a signal would only cost the last words and the exit code
            for deaf in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(deaf, signal.SIG_IGN)
        if result == INTERRUPTED:  # typer makes that of a KeyboardInterrupt
            return _interrupted()
        return int(result) if isinstance(result, int) else DONE
    except UsageError as error:
        where = f" ({error.ctx.command_path} --help)" if error.ctx is not None else ""
        say(f"error: {error.format_message()}{where}")
        return WRONG_REQUEST
    except typer.Exit as error:
        return _interrupted() if error.exit_code == INTERRUPTED else int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except RequestError as error:
        say(f"error: {error}")
        return WRONG_REQUEST
    except StageInterrupted as error:
        say(f"{error}; the same command goes on from there")
        return REQUEUE
    except StageFailed as error:
        say(f"error: {error}")
        return FAILED
    except BrokenPipeError:
        return DONE
    except Exception as error:  # noqa: BLE001 (the last handler: the traceback is printed)
        import traceback

        said = refused(error) if isinstance(error, OSError) else None
        if said is not None and os.environ.get(TRACEBACK_VARIABLE) != "1":
            say(f"error: {said}")
            return WRONG_REQUEST
        traceback.print_exc()
        say(f"error: {type(error).__name__}: {error}")
        return FAILED
