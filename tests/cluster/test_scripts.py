"""The batch scripts on a real Slurm, with a small honest stage in the place of chainrule.

The stage counts, a step every twentieth of a second on every rank, up to the number that the
file `upto` holds. On SIGTERM or SIGUSR1 every rank stops and exits with 75, as chainrule does.
"""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chainrule.pipeline.slurm_log import reason_of_restart

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.cluster

COUNTER = """#!/usr/bin/env python3
import os, signal, sys, time
from pathlib import Path

_, stage, out = sys.argv[:3]
rank, out = int(os.environ["RANK"]), Path(out)
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(number))
with open(out / "attempts", "a") as file:
    file.write(f"{os.environ['CHAINRULE_ATTEMPT']} {rank}/{os.environ['WORLD_SIZE']} "
               f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} {os.getpid()}\\n")
kept = out / f"count.{rank}"
count = int(kept.read_text()) if kept.exists() else 0
while count < int((out / "upto").read_text()):
    if asked:
        time.sleep(0.2 * rank)  # ranks never stop at quite the same time
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        sys.exit(75)
    count += 1
    kept.write_text(str(count))
    time.sleep(0.05)
"""


class Counting:
    """Jobs of slurm/pretrain.sbatch that run the counter on two nodes."""

    def __init__(self, cluster: "Cluster", folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.program = folder / "counter"
        self.program.write_text(COUNTER)
        self.program.chmod(0o755)

    def count_to(self, number: int) -> None:
        temporary = self.folder / "upto.tmp"
        temporary.write_text(str(number))
        temporary.replace(self.folder / "upto")

    def counted(self) -> list[int]:
        return [int((self.folder / f"count.{rank}").read_text()) for rank in (0, 1)]

    def submit(self, upto: int, *options: str) -> str:
        self.count_to(upto)
        line = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4"]
        line += [f"--output={self.folder}/log", f"--chdir={self.cluster.checkout}", "--time=5"]
        line += [f"--export=ALL,CHAINRULE={self.program}", *options]
        line += [
            str(self.cluster.checkout / "slurm" / "pretrain.sbatch"),
            str(self.folder),
            str(upto),
        ]
        return self.cluster.slurm(*line).strip()

    def attempts(self) -> list[list[str]]:
        path = self.folder / "attempts"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_step(self, step: int) -> None:
        kept = [self.folder / f"count.{rank}" for rank in (0, 1)]
        self.cluster.wait_until(
            lambda: all(k.exists() and int(k.read_text() or 0) >= step for k in kept),
            60,
            f"step {step}",
            lambda: (self.folder / "log").read_text() if (self.folder / "log").exists() else "",
        )

    def ends_whole(self, job: str, restarts: int = 0) -> None:
        """The job goes on from where it stopped, after that many restarts, to the end."""
        before = self.counted() if restarts else [0, 0]
        self.count_to(max(before) + 10)
        state = self.cluster.wait_for(job, ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
        assert state == "COMPLETED", (self.folder / "log").read_text()
        assert self.cluster.job(job)["Restarts"] == str(restarts)
        assert self.counted() == [max(before) + 10] * 2
        assert {a[0] for a in self.attempts()} == {f"{job}.{i}" for i in range(restarts + 1)}


@pytest.fixture
def counting(cluster: "Cluster", tmp_path: Path) -> Counting:
    return Counting(cluster, tmp_path)


def test_a_quiet_run_is_one_attempt_with_a_rendezvous(counting: Counting) -> None:
    job = counting.submit(10)
    counting.ends_whole(job)
    attempts = counting.attempts()
    assert sorted(a[1] for a in attempts) == ["0/2", "1/2"]
    assert {a[0] for a in attempts} == {f"{job}.0"}
    assert {a[2] for a in attempts} == {f"127.0.0.1:{20000 + int(job) % 20000}"}


def test_the_time_limit_saves_and_requeues(counting: Counting) -> None:
    job = counting.submit(9999, "--time=1", "--signal=B:USR1@55")
    counting.wait_for_step(5)
    counting.cluster.wait_for(job, ("PENDING",), 90)  # requeued
    assert reason_of_restart(counting.folder / "log", 0) == "time limit"
    # Slurm sends a signal up to a minute early: under the same limit it may meet this attempt too
    counting.cluster.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=5")
    counting.ends_whole(job, restarts=1)


def test_ranks_that_save_on_preemption_are_not_taken_for_finished(counting: Counting) -> None:
    job = counting.submit(9999, "--exclusive")
    counting.wait_for_step(5)
    urgent = counting.cluster.slurm(
        "sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null",
        "--wrap", "srun sleep 1",
    ).strip()  # fmt: skip
    assert counting.cluster.wait_for(urgent, ("COMPLETED", "FAILED"), 60) == "COMPLETED"
    counting.ends_whole(job, restarts=1)


def test_a_cancelled_job_does_not_rise_from_the_dead(counting: Counting) -> None:
    job = counting.submit(9999)
    counting.wait_for_step(5)
    counting.cluster.slurm("scancel", job)
    assert counting.cluster.wait_for(job, ("CANCELLED", "PENDING", "COMPLETED")) == "CANCELLED"
    counting.cluster.wait_until(
        lambda: not counting.cluster.processes("counter"), 20, "ranks are gone"
    )
    counted = counting.counted()
    following = counting.submit(1, "--dependency=afterany:" + job)  # outlasts a late requeue
    counting.cluster.wait_for(following, ("COMPLETED",))
    assert counting.cluster.state(job) == "CANCELLED"
    assert counting.counted() == counted
    assert "requeued" not in (counting.folder / "log").read_text()


def test_a_killed_rank_takes_the_others_along_and_the_job_goes_on(counting: Counting) -> None:
    job = counting.submit(9999)
    counting.wait_for_step(5)
    pid = next(int(a[3]) for a in counting.attempts() if a[1] == "1/2")
    os.kill(pid, signal.SIGKILL)
    counting.cluster.wait_for(job, ("PENDING",), 30)
    counting.ends_whole(job, restarts=1)


def test_a_requeue_by_hand_goes_on_where_it_stopped(counting: Counting) -> None:
    job = counting.submit(9999)
    counting.wait_for_step(5)
    counting.cluster.slurm("scontrol", "requeue", job)
    counting.cluster.wait_for(job, ("PENDING",), 30)
    counting.ends_whole(job, restarts=1)


def test_a_lost_node_gives_the_job_to_others(counting: Counting) -> None:
    job = counting.submit(9999)
    counting.wait_for_step(5)
    counting.cluster.slurm(
        "scontrol", "update", "NodeName=127.0.0.2", "State=DOWN", "Reason=pulled"
    )
    counting.cluster.wait_for(job, ("PENDING",), 30)
    # a live slurmd may have registered again by itself
    counting.cluster.slurm("scontrol", "update", "NodeName=127.0.0.2", "State=RESUME", check=False)
    counting.ends_whole(job, restarts=1)


def test_a_failure_is_not_requeued(counting: Counting) -> None:
    counting.program.write_text("#!/bin/sh\nexit 1\n")
    job = counting.submit(1)
    assert counting.cluster.wait_for(job, ("COMPLETED", "FAILED")) == "FAILED"
    assert counting.cluster.job(job)["ExitCode"] == "1:0"
    assert counting.cluster.job(job)["Restarts"] == "0"
