"""One stage on several processes of this machine, each of which calls `stage_run.run_here`."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from typing import Any

from chainrule.pipeline.artifact import ATTEMPT, partial_folder, read_json
from chainrule.pipeline.graph import Pipeline, StageSpec
from chainrule.pipeline.stage import FAILED, REQUEUE, StageFailed, StageInterrupted
from chainrule.pipeline.stage_run import ATTEMPT_VARIABLE


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
    codes, first = _wait_for(ranks)
    if any(code == REQUEUE for code in codes):
        raise StageInterrupted(f"stage '{name}' saved its state and stopped")
    if any(codes):
        attempt_path = partial_folder(pipeline.folder(name)) / ATTEMPT
        if first is not None and codes[first] < 0:
            # What the others say of it is that somebody no longer answers.
            by = signal.Signals(-codes[first]).name
            perhaps = ", as the kernel does when memory runs out" if by == "SIGKILL" else ""
            raise StageFailed(
                f"stage '{name}': rank {first} was killed by {by}{perhaps}; what is saved stands, "
                "the same command goes on from there"
            )
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


def _wait_for(ranks: list[subprocess.Popen]) -> tuple[list[int], int | None]:
    """Exit codes of all ranks, and which was the first to end badly; it ends the rest after a
    grace of 10 s. A signal goes on to them; one that all had ended before they heard it is passed
    on as it came."""
    came: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        came.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    passed_on = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, forward) for number in passed_on}
    ending: float | None = None
    first: int | None = None
    try:
        while any(process.poll() is None for process in ranks):
            time.sleep(0.05)
            bad = [rank for rank, process in enumerate(ranks) if process.poll()]
            if ending is None and bad:
                # One that was killed goes before one that found it gone, within a turn.
                first = min(bad, key=lambda rank: ranks[rank].returncode >= 0)
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
    codes = [process.returncode for process in ranks]
    if first is None and any(codes):  # all at once
        first = min((rank for rank, code in enumerate(codes) if code), key=lambda r: codes[r] >= 0)
    if came and not any(codes):
        signal.raise_signal(came[0])
    return codes, first


def die_with_parent() -> None:
    """A rank that `run_ranks` started ends when its launcher is killed (Linux)."""
    parent = os.environ.get("CHAINRULE_PARENT_PID")
    if parent is None or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        os._exit(FAILED)
