"""Slurm, as the pipeline sees it: profiles, `sbatch` lines, the states of jobs.

Everything goes through Slurm's own commands in their plain-text formats (the JSON of
`squeue` changes between versions). An error is Slurm's own message with the line that
caused it.
"""

import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import Field

from chainrule.pipeline.config import RequestError, Resources, Settings, explain, nearest

# fmt: off
ALIVE = frozenset((
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD",
    "REQUEUE_FED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT",
))
# fmt: on
"""States of a job that may still run or is running."""
FIELDS = "%i|%F|%T|%r|%N|%M"


class JobDefaults(Settings):
    """What a kind of job asks for where its stage's `resources` say nothing."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpu_type: str | None = Field(None, description="as in --gres=gpu:TYPE:N")
    time: str | None = Field(None, description="time limit, as Slurm writes it: 1-00:00:00")
    cpus: int | None = Field(None, ge=1, description="CPU cores a rank")
    memory: str | None = Field(None, description="a node, as Slurm writes it: 64G")
    options: list[str] = Field([], description="further sbatch options, as they are")


class Profile(JobDefaults):
    """One cluster: `slurm/profiles/<name>.yaml`."""

    jobs: dict[str, JobDefaults] = Field({}, description="defaults of one kind of job, by its name")
    scratch: str | None = Field(None, description="node-local folder; TMPDIR of a job lies in it")
    mlflow: str | None = Field(None, description="address of the MLflow server")
    environment: dict[str, str] = Field({}, description="further variables of every job")
    signal_before_s: int = Field(
        120, ge=1, description="seconds before the time limit at which a job saves and requeues"
    )
    restarts_without_progress: int = Field(
        5, ge=1, description="restarts in a row that bring a stage no further before it fails"
    )
    hang_after_s: int | None = Field(
        1800, ge=1, description="seconds without a step after which a job ends with its stacks"
    )
    array_size: int | None = Field(
        None, ge=1, description="most tasks of one array (default: the site's MaxArraySize)"
    )
    array_limit: int | None = Field(None, ge=1, description="array tasks running at once")

    def of(self, job: str) -> JobDefaults:
        """The defaults of a kind of job: its own over the profile's."""
        own = self.jobs.get(job, JobDefaults())
        values = {
            name: getattr(own, name) if name in own.model_fields_set else getattr(self, name)
            for name in JobDefaults.model_fields
        }
        return JobDefaults(**values)


def scripts_folder() -> Path:
    """`slurm/` of the checkout; RequestError where the package runs without one."""
    folder = Path(__file__).resolve().parents[1] / "slurm"
    if not (folder / "run_stage.sh").is_file():
        raise RequestError(
            f"{folder}: no batch scripts there; submit from a checkout of chainrule "
            "(pip install -e .)"
        )
    return folder


def load_profile(given: str | None, jobs: Sequence[str]) -> Profile:
    """A profile by path or by its name under slurm/profiles/; none gives Slurm's own defaults."""
    if given is None:
        return Profile()
    path = Path(given)
    if not path.is_file():
        folder = scripts_folder() / "profiles"
        path = folder / f"{given}.yaml"
        if not path.is_file():
            known = [p.stem for p in folder.glob("*.yaml")]
            raise RequestError(f"no profile '{given}' in {folder}{nearest(given, known)}")
    try:
        value = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise RequestError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    try:
        profile = Profile.model_validate(value)
    except pydantic.ValidationError as error:
        raise RequestError(f"{path}: {explain(error, Profile)[0][1]}") from None
    for job in profile.jobs:
        if job not in jobs:
            raise RequestError(f"{path}: jobs: unknown job '{job}'{nearest(job, list(jobs))}")
    return profile


# --- talking to Slurm ---------------------------------------------------------------------


def is_here() -> bool:
    return shutil.which("sbatch") is not None


def require_slurm() -> None:
    """RequestError where there is no Slurm on the path."""
    if not is_here():
        raise RequestError(
            "no Slurm on the path (sbatch not found); load the site's Slurm module, "
            "or run the stages here with `chainrule run`"
        )


def call(command: Sequence[str]) -> str:
    """Standard output of a Slurm command; RequestError with its own message and the line."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or f"exit {done.returncode}").replace("\n", "; ")
        raise RequestError(f"{said}\n  from: {shlex.join(command)}")
    return done.stdout


def submit_line(line: Sequence[str]) -> str:
    """Queue a job; its id."""
    return call(line).strip().split(";")[0]


def cancel(jobs: Iterable[str]) -> None:
    call(["scancel", *jobs])


def array_size_of_site() -> int:
    """How many tasks one array may have (MaxArraySize - 1 is the largest index)."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call(["scontrol", "show", "config"]), re.M)
    return int(found[1]) if found else 1001


@dataclass(frozen=True)
class Job:
    """What Slurm says of one job (an array counts as one job)."""

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    restarts: int = 0
    exit_code: str = ""
    tasks: Mapping[str, int] = field(default_factory=dict)
    """Of an array: how many of its tasks are in each state."""
    failed_task: str | None = None
    """Of an array: the first task that ended otherwise than well, `<job>_<task>`."""

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


def jobs_of(ids: Sequence[str]) -> dict[str, Job]:
    """The jobs among `ids` that Slurm still knows: the queue first, then accounting.

    RequestError where the controller cannot be reached.
    """
    if not ids:
        return {}
    found = _queue(ids)
    missing = [i for i in ids if i not in found]
    found |= _accounting(missing) if missing else {}
    return found


def _queue(ids: Sequence[str]) -> dict[str, Job]:
    command = ["squeue", "-h", "-r", "-t", "all", "-j", ",".join(ids), "-o", FIELDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return {}
        raise RequestError(f"{done.stderr.strip()}\n  from: {shlex.join(command)}")
    tasks: dict[str, list[Job]] = {}
    for line in done.stdout.splitlines():
        task, parent, state, reason, nodes, elapsed = line.split("|")
        tasks.setdefault(parent, []).append(Job(task, state, reason, nodes, elapsed))
    return {parent: _detailed(_one_of(parent, group)) for parent, group in tasks.items()}


def _one_of(parent: str, tasks: Sequence[Job]) -> Job:
    """An array as one job: alive while a task is, failed if one failed."""
    if [task.id for task in tasks] == [parent]:
        return tasks[0]
    failed = [task for task in tasks if not task.alive and task.state != "COMPLETED"]
    shown = failed[0] if failed else tasks[0]
    for state in ("RUNNING", "COMPLETING", "PENDING"):
        if found := [task for task in tasks if task.state == state]:
            shown = found[0]
            break
    return replace(
        shown,
        id=parent,
        restarts=sum(task.restarts for task in tasks),
        tasks=Counter(task.state for task in tasks),
        failed_task=failed[0].id if failed else None,
    )


def _detailed(job: Job) -> Job:
    """With what only `scontrol` tells: restarts and the exit code."""
    done = subprocess.run(
        ["scontrol", "show", "job", "-o", job.failed_task or job.id],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in done.stdout.splitlines()]
    codes = [values["ExitCode"] for values in lines if "ExitCode" in values]
    restarts = sum(int(values.get("Restarts", "0")) for values in lines)
    return replace(job, restarts=restarts, exit_code=codes[0] if codes else "")


def _accounting(ids: Sequence[str]) -> dict[str, Job]:
    """Ended jobs that only the accounting still knows; none where accounting is off.

    One row an attempt (`-D`): a job that was requeued has several, the newest last.
    """
    if shutil.which("sacct") is None:
        return {}
    command = ["sacct", "-n", "-P", "-X", "-D", "-j", ",".join(ids)]
    command += ["-o", "JobID,State,Reason,NodeList,Elapsed,ExitCode"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {}  # accounting is off: the stage's own record has to do
    newest: dict[str, Job] = {}
    for line in done.stdout.splitlines():
        task, states, reason, nodes, elapsed, code = line.split("|")
        state = states.split()[0] if states else "UNKNOWN"  # "CANCELLED by 1000"
        nodes = "" if nodes == "None assigned" else nodes
        if states == "CANCELLED" and not nodes:  # by nobody, before it began: by Slurm itself
            reason = "Dependency"
        restarts = newest[task].restarts + 1 if task in newest else 0
        newest[task] = Job(task, state, reason, nodes, elapsed, restarts, code)
    tasks: dict[str, list[Job]] = {}
    for task, job in newest.items():
        tasks.setdefault(task.split("_")[0], []).append(job)
    return {parent: _one_of(parent, group) for parent, group in tasks.items()}


# --- the line of a stage ------------------------------------------------------------------


def sbatch_line(
    script: Path,
    arguments: Sequence[str],
    resources: Resources,
    defaults: JobDefaults,
    *,
    name: str,
    folder: Path,
    log: Path,
    signal_before_s: int,
    environment: Mapping[str, str],
    after: Sequence[str] = (),
    array: str | None = None,
) -> list[str]:
    """The exact `sbatch` command of one stage: its resources over the profile's defaults."""

    def either(key: str) -> Any:
        own = getattr(resources, key)
        return own if own is not None else getattr(defaults, key)

    line = ["sbatch", "--parsable", f"--job-name={name}", f"--chdir={folder}", f"--output={log}"]
    line += ["--open-mode=append", "--requeue", "--kill-on-invalid-dep=yes"]
    line += [f"--signal=B:USR1@{signal_before_s}"]
    ranks = resources.gpus or resources.processes
    line += [f"--nodes={resources.nodes}", f"--ntasks-per-node={ranks}"]
    for key, option in (
        ("cpus", "--cpus-per-task"),
        ("memory", "--mem"),
        ("time", "--time"),
        ("partition", "--partition"),
        ("account", "--account"),
        ("qos", "--qos"),
    ):
        if (value := either(key)) is not None:
            line.append(f"{option}={value}")
    if resources.gpus:
        kind = either("gpu_type")
        line.append(f"--gres=gpu:{f'{kind}:' if kind else ''}{resources.gpus}")
    if array is not None:
        line.append(f"--array={array}")
    if after:
        line.append(f"--dependency=afterok:{':'.join(after)}")
    exported = ",".join(["ALL", *(f"{key}={value}" for key, value in environment.items())])
    line += [f"--export={exported}", *defaults.options, str(script), *arguments]
    return line
